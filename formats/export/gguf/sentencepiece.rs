//! Reads the part of a SentencePiece `tokenizer.model` that GGUF keeps: pieces with scores and types, whether a
//! space is put before a text, and which kind of model it is.
//!
//! The file is one message of protocol buffers: fields, each a key (number << 3 | wire type, as a varint) and a value. Of
//! `ModelProto`: pieces (1: text 1, score 2, type 3), trainer (2: model type 3), normalizer (3: dummy prefix 3).
//!
//! Source: `sentencepiece_model.proto` of the SentencePiece repository.

/// One piece: its text, score, and type, whose numbers GGUF shares (1 normal, 2 unknown, 3 control, 4 user
/// defined, 5 unused, 6 byte).
pub type Piece = (String, f32, i32);

/// What a file says.
#[derive(Debug, Clone, PartialEq)]
pub struct SentencePiece {
    /// By id.
    pub pieces: Vec<Piece>,
    /// Whether a space is put before a text.
    pub space_prefix: bool,
    /// 1 unigram, 2 BPE.
    pub kind: u64,
}

/// A field's value.
enum Field<'a> {
    Number(u64),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
    Other,
}

/// Takes the next field off `message`. `None` at its end or when it is damaged.
fn next<'a>(message: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let key = varint(message)?;
    let mut take = |count: usize| {
        let (head, tail) = message.split_at_checked(count)?;
        *message = tail;
        Some(head)
    };
    let value = match key & 7 {
        0 => Field::Number(varint(message)?),
        1 => take(8).map(|_| Field::Other)?,
        2 => {
            let length = usize::try_from(varint(message)?).ok()?;
            let (head, tail) = message.split_at_checked(length)?;
            *message = tail;
            Field::Bytes(head)
        }
        5 => Field::Fixed32(*take(4)?.first_chunk()?),
        _ => return None,
    };
    Some((key >> 3, value))
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// All fields of a message. `None` when it is damaged.
fn fields(mut message: &[u8]) -> Option<Vec<(u64, Field<'_>)>> {
    let mut all = Vec::new();
    while !message.is_empty() {
        all.push(next(&mut message)?);
    }
    Some(all)
}

fn piece(message: &[u8]) -> Option<Piece> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, 1);
    for field in fields(message)? {
        match field {
            (1, Field::Bytes(bytes)) => text = String::from_utf8(bytes.to_vec()).ok()?,
            (2, Field::Fixed32(bytes)) => score = f32::from_le_bytes(bytes),
            (3, Field::Number(number)) => kind = i32::try_from(number).ok()?,
            _ => {}
        }
    }
    Some((text, score, kind))
}

/// The number of field `wanted` of a message, or `otherwise` when it is left out.
fn number(message: &[u8], wanted: u64, otherwise: u64) -> Option<u64> {
    let mut found = otherwise;
    for field in fields(message)? {
        if let (number, Field::Number(value)) = field
            && number == wanted
        {
            found = value;
        }
    }
    Some(found)
}

impl SentencePiece {
    /// Reads the bytes of a file. `None` when they are no such message.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut this = Self {
            pieces: Vec::new(),
            space_prefix: true,
            kind: 1,
        };
        for field in fields(bytes)? {
            match field {
                (1, Field::Bytes(message)) => this.pieces.push(piece(message)?),
                (2, Field::Bytes(message)) => this.kind = number(message, 3, 1)?,
                (3, Field::Bytes(message)) => this.space_prefix = number(message, 3, 1)? != 0,
                _ => {}
            }
        }
        (!this.pieces.is_empty()).then_some(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pieces, a trainer that says BPE, a normalizer without a prefix; fields of other kinds in between.
    #[test]
    fn a_message_by_hand() {
        let mut bytes = vec![0x0a, 12, 0x0a, 3, 0xe2, 0x96, 0x81, 0x15];
        bytes.extend((-1.5f32).to_le_bytes());
        bytes.extend([0x0a, 5, 0x0a, 1, b'a', 0x18, 3]);
        bytes[1] = 10;
        bytes.extend([0x12, 2, 0x18, 2]);
        bytes.extend([0x1a, 2, 0x18, 0]);
        bytes.extend([0x79, 0, 0, 0, 0, 0, 0, 0, 0]);
        let model = SentencePiece::parse(&bytes).unwrap();
        assert_eq!(
            model.pieces,
            [("\u{2581}".to_owned(), -1.5, 1), ("a".to_owned(), 0.0, 3)]
        );
        assert_eq!((model.space_prefix, model.kind), (false, 2));
        for cut in 1..bytes.len() {
            let _ = SentencePiece::parse(&bytes[..cut]); // cut short, it must not panic
        }
        assert_eq!(SentencePiece::parse(b"{\"json\": 1}"), None);
        assert_eq!(SentencePiece::parse(&[]), None);
        assert_eq!(
            SentencePiece::parse(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]),
            None,
            "longer than the file"
        );
    }
}
