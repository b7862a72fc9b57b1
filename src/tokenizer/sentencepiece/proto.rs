//! The file: a protocol-buffer message `ModelProto`. Owns the few fields of it that encoding and decoding need;
//! all others are passed over. Source: `sentencepiece_model.proto` of the SentencePiece project.

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
