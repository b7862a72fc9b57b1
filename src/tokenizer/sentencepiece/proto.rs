//! The file: a protocol-buffer message `ModelProto`. Owns the few fields of it that encoding and decoding need, read and
//! written; all others are passed over. Source: `sentencepiece_model.proto` of the SentencePiece project.

/// What a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Part of texts.
    Normal,
    /// Stands for what the vocabulary lacks.
    Unknown,
    /// Never found in a text: `<s>`.
    Control,
    /// Found in a text before anything else, and never cut.
    UserDefined,
    /// One byte: `<0x0A>`.
    Byte,
    /// May be built on the way to a longer piece, but is no token.
    Unused,
}

/// A line of the vocabulary; its place is its id.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// With U+2581 for each space.
    pub text: String,
    /// Of BPE the negative rank of its merge, of unigram ln p.
    pub score: f32,
    /// See [`Kind`].
    pub kind: Kind,
}

/// How texts are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// The most probable sequence of pieces.
    Unigram,
    /// Merges from characters upwards, best score first.
    Bpe,
}

/// The fields in use.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The vocabulary.
    pub pieces: Vec<Piece>,
    /// How texts are cut.
    pub algorithm: Algorithm,
    /// Unknown characters become bytes.
    pub byte_fallback: bool,
    /// What an unknown piece decodes to.
    pub unknown_surface: String,
    /// Rules of normalization, compiled; may be empty.
    pub charsmap: Vec<u8>,
    /// A space is put before the text (or after it, see `suffix`).
    pub dummy_prefix: bool,
    /// White space at both ends is removed, and runs of it become one.
    pub squeeze: bool,
    /// Spaces become U+2581.
    pub escape: bool,
    /// Words carry their space at the end.
    pub suffix: bool,
}

/// One field of a message.
enum Field<'a> {
    Number(u64),
    Fixed32([u8; 4]),
    Fixed64,
    Bytes(&'a [u8]),
}

/// Reads the message. Fails with what is wrong, as the end of a sentence.
pub fn parse(bytes: &[u8]) -> Result<Model, String> {
    let mut model = Model {
        pieces: Vec::new(),
        algorithm: Algorithm::Unigram,
        byte_fallback: false,
        unknown_surface: " \u{2047} ".to_owned(),
        charsmap: Vec::new(),
        dummy_prefix: true,
        squeeze: true,
        escape: true,
        suffix: false,
    };
    each(bytes, &mut |number, field| {
        match (number, field) {
            (1, Field::Bytes(bytes)) => model.pieces.push(piece(bytes)?),
            (2, Field::Bytes(bytes)) => trainer(bytes, &mut model)?,
            (3, Field::Bytes(bytes)) => normalizer(bytes, &mut model)?,
            (5, Field::Bytes(bytes)) => {
                let mut rules = model.clone();
                rules.charsmap.clear();
                normalizer(bytes, &mut rules)?;
                if !rules.charsmap.is_empty() {
                    return Err(
                        "it changes decoded texts by rules of its own, which is not supported".to_owned(),
                    );
                }
            }
            _ => {}
        }
        Ok(())
    })?;
    if model.pieces.is_empty() {
        return Err("it holds no pieces".to_owned());
    }
    Ok(model)
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, Kind::Normal);
    each(bytes, &mut |number, field| {
        match (number, field) {
            (1, Field::Bytes(bytes)) => {
                text =
                    String::from_utf8(bytes.to_vec()).map_err(|_| "a piece is no UTF-8 text".to_owned())?;
            }
            (2, Field::Fixed32(bytes)) => score = f32::from_le_bytes(bytes),
            (3, Field::Number(n)) => {
                kind = match n {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    other => return Err(format!("a piece is of the unknown type {other}")),
                }
            }
            _ => {}
        }
        Ok(())
    })?;
    if text.is_empty() || !score.is_finite() {
        return Err("a piece is empty, or its score is no number".to_owned());
    }
    Ok(Piece { text, score, kind })
}

fn trainer(bytes: &[u8], model: &mut Model) -> Result<(), String> {
    each(bytes, &mut |number, field| {
        match (number, field) {
            (3, Field::Number(n)) => {
                model.algorithm = match n {
                    1 => Algorithm::Unigram,
                    2 => Algorithm::Bpe,
                    3 => {
                        return Err(
                            "models of type WORD are not supported, expected BPE or UNIGRAM".to_owned()
                        );
                    }
                    _ => {
                        return Err(
                            "models of type CHAR are not supported, expected BPE or UNIGRAM".to_owned()
                        );
                    }
                }
            }
            (24, Field::Number(n)) => model.suffix = n != 0,
            (35, Field::Number(n)) => model.byte_fallback = n != 0,
            (44, Field::Bytes(bytes)) => model.unknown_surface = String::from_utf8_lossy(bytes).into_owned(),
            _ => {}
        }
        Ok(())
    })
}

fn normalizer(bytes: &[u8], model: &mut Model) -> Result<(), String> {
    each(bytes, &mut |number, field| {
        match (number, field) {
            (2, Field::Bytes(bytes)) => model.charsmap = bytes.to_vec(),
            (3, Field::Number(n)) => model.dummy_prefix = n != 0,
            (4, Field::Number(n)) => model.squeeze = n != 0,
            (5, Field::Number(n)) => model.escape = n != 0,
            _ => {}
        }
        Ok(())
    })
}

/// Every field of a message, in order.
fn each<'a>(
    mut rest: &'a [u8],
    take: &mut dyn FnMut(u64, Field<'a>) -> Result<(), String>,
) -> Result<(), String> {
    let damaged = || "the file is cut off or damaged".to_owned();
    while !rest.is_empty() {
        let tag = varint(&mut rest).ok_or_else(damaged)?;
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut rest).ok_or_else(damaged)?),
            1 => {
                split(&mut rest, 8).ok_or_else(damaged)?;
                Field::Fixed64
            }
            2 => {
                let length = varint(&mut rest).ok_or_else(damaged)?;
                let length = usize::try_from(length).map_err(|_| damaged())?;
                Field::Bytes(split(&mut rest, length).ok_or_else(damaged)?)
            }
            5 => {
                let bytes = split(&mut rest, 4).and_then(|b| b.try_into().ok());
                Field::Fixed32(bytes.ok_or_else(damaged)?)
            }
            _ => return Err(damaged()),
        };
        if tag >> 3 == 0 {
            return Err(damaged());
        }
        take(tag >> 3, field)?;
    }
    Ok(())
}

fn split<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(head)
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// The message of a model: what [`parse`] reads again.
pub fn write(model: &Model) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in &model.pieces {
        let mut inner = Vec::new();
        bytes_field(1, piece.text.as_bytes(), &mut inner);
        put_varint(2 << 3 | 5, &mut inner);
        inner.extend_from_slice(&piece.score.to_le_bytes());
        let kind = match piece.kind {
            Kind::Normal => 1,
            Kind::Unknown => 2,
            Kind::Control => 3,
            Kind::UserDefined => 4,
            Kind::Unused => 5,
            Kind::Byte => 6,
        };
        number_field(3, kind, &mut inner);
        bytes_field(1, &inner, &mut out);
    }
    let (mut trainer, mut normalizer) = (Vec::new(), Vec::new());
    let algorithm = match model.algorithm {
        Algorithm::Unigram => 1,
        Algorithm::Bpe => 2,
    };
    number_field(3, algorithm, &mut trainer);
    number_field(24, model.suffix.into(), &mut trainer);
    number_field(35, model.byte_fallback.into(), &mut trainer);
    for (field, role) in [(40, Kind::Unknown), (41, Kind::Control), (42, Kind::Control)] {
        // Which pieces are unknown, begin and end: the first of their kind, as SentencePiece itself numbers them.
        let mut of_role = model
            .pieces
            .iter()
            .enumerate()
            .filter(|(_, piece)| piece.kind == role);
        if let Some((id, _)) = of_role.nth(usize::from(field == 42)) {
            number_field(field, id as u64, &mut trainer);
        }
    }
    bytes_field(44, model.unknown_surface.as_bytes(), &mut trainer);
    bytes_field(2, &trainer, &mut out);
    bytes_field(2, &model.charsmap, &mut normalizer);
    number_field(3, model.dummy_prefix.into(), &mut normalizer);
    number_field(4, model.squeeze.into(), &mut normalizer);
    number_field(5, model.escape.into(), &mut normalizer);
    bytes_field(3, &normalizer, &mut out);
    out
}

fn bytes_field(number: u64, bytes: &[u8], out: &mut Vec<u8>) {
    put_varint(number << 3 | 2, out);
    put_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn number_field(number: u64, value: u64, out: &mut Vec<u8>) {
    put_varint(number << 3, out);
    put_varint(value, out);
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `pieces { piece: "a" score: -1 type: BYTE } trainer_spec { model_type: BPE byte_fallback: true }
    /// normalizer_spec { add_dummy_prefix: false }`, by hand.
    const SMALL: &[u8] = &[
        0x0a, 10, 0x0a, 1, b'a', 0x15, 0, 0, 0x80, 0xbf, 0x18, 6, // a piece
        0x12, 5, 0x18, 2, 0x98, 2, 1, // trainer
        0x1a, 2, 0x18, 0, // normalizer
    ];

    #[test]
    fn a_message_by_hand() {
        let model = parse(SMALL).unwrap();
        let piece = Piece {
            text: "a".to_owned(),
            score: -1.0,
            kind: Kind::Byte,
        };
        assert_eq!(model.pieces, [piece]);
        assert_eq!((model.algorithm, model.byte_fallback), (Algorithm::Bpe, true));
        assert_eq!((model.dummy_prefix, model.squeeze), (false, true));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let piece = |text: &str, score, kind| Piece {
            text: text.to_owned(),
            score,
            kind,
        };
        let model = Model {
            pieces: vec![
                piece("<unk>", 0.0, Kind::Unknown),
                piece("<s>", 0.0, Kind::Control),
                piece(&"a".repeat(300), -1.5, Kind::Normal),
                piece("<0x0A>", -2.0, Kind::Byte),
            ],
            algorithm: Algorithm::Bpe,
            byte_fallback: true,
            unknown_surface: "?".to_owned(),
            charsmap: vec![1, 2, 3],
            dummy_prefix: false,
            squeeze: false,
            escape: true,
            suffix: true,
        };
        assert_eq!(parse(&write(&model)).unwrap(), model);
    }

    #[test]
    fn damage_is_said() {
        for cut in (1..12).chain([13, 15, 20]) {
            assert!(parse(&SMALL[..cut]).is_err(), "{cut}");
        }
        assert!(parse(&[]).unwrap_err().contains("no pieces"));
        let mut word = SMALL.to_vec();
        word[15] = 3;
        assert!(parse(&word).unwrap_err().contains("WORD"));
        assert!(parse(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f").is_err());
    }
}
