//! The vocabulary, to be looked up: pieces by their text, and by how a text begins.

use std::collections::HashMap;

use super::proto::{Kind, Piece};

/// The pieces of a model.
#[derive(Debug)]
pub struct Pieces {
    all: Vec<Piece>,
    by_text: HashMap<String, u32>,
    /// What may be found in a text or built from it: normal, user-defined and unused pieces.
    in_texts: Trie,
    user_defined: Trie,
    bytes: Vec<Option<u32>>,
    unknown: u32,
}

impl Pieces {
    /// Fails, with the end of a sentence, when a piece comes twice, there is no unknown piece, or bytes are
    /// missing where unknown characters become bytes.
    pub fn new(all: Vec<Piece>, byte_fallback: bool) -> Result<Self, String> {
        let mut by_text = HashMap::with_capacity(all.len());
        let (mut in_texts, mut user_defined) = (Trie::default(), Trie::default());
        let (mut bytes, mut unknown) = (vec![None; 256], None);
        for (id, piece) in (0u32..).zip(&all) {
            if by_text.insert(piece.text.clone(), id).is_some() {
                return Err(format!("the piece {:?} comes twice", piece.text));
            }
            match piece.kind {
                Kind::Unknown => unknown = Some(id),
                Kind::Byte => *byte_of(&piece.text, &mut bytes)? = Some(id),
                Kind::Control => {}
                Kind::Normal | Kind::UserDefined | Kind::Unused => in_texts.insert(&piece.text, id),
            }
            if piece.kind == Kind::UserDefined {
                user_defined.insert(&piece.text, id);
            }
        }
        if byte_fallback && bytes.contains(&None) {
            return Err(
                "unknown characters become bytes, but some of the 256 bytes have no piece".to_owned(),
            );
        }
        Ok(Self {
            all,
            by_text,
            in_texts,
            user_defined,
            bytes,
            unknown: unknown.ok_or("it has no piece for unknown text")?,
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// The piece of an id.
    pub fn get(&self, id: u32) -> Option<&Piece> {
        self.all.get(id as usize)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Piece> {
        self.all.iter()
    }

    /// Id of exactly this piece.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.by_text.get(text).copied()
    }

    /// Id of the unknown piece.
    pub fn unknown(&self) -> u32 {
        self.unknown
    }

    /// Id of a byte's piece.
    pub fn byte(&self, byte: u8) -> Option<u32> {
        self.bytes[usize::from(byte)]
    }

    /// Id of a piece that may be built from texts.
    pub fn buildable(&self, text: &str) -> Option<u32> {
        let id = self.id(text)?;
        let kind = self.all[id as usize].kind;
        matches!(kind, Kind::Normal | Kind::UserDefined | Kind::Unused).then_some(id)
    }

    /// The pieces that `text` begins with and that may be found in texts, by length in bytes, rising.
    pub fn prefixes<'p>(&'p self, text: &'p str) -> impl Iterator<Item = (usize, u32)> + 'p {
        self.in_texts.prefixes(text.as_bytes())
    }

    /// Bytes of the longest user-defined piece that `text` begins with.
    pub fn user_defined(&self, text: &str) -> Option<usize> {
        self.user_defined
            .prefixes(text.as_bytes())
            .last()
            .map(|(length, _)| length)
    }
}

/// The place of the byte that `<0x0A>` is a name of.
fn byte_of<'b>(name: &str, bytes: &'b mut [Option<u32>]) -> Result<&'b mut Option<u32>, String> {
    let digits = name.strip_prefix("<0x").and_then(|n| n.strip_suffix('>'));
    let byte = digits.and_then(|d| u8::from_str_radix(d, 16).ok());
    let byte =
        byte.ok_or_else(|| format!("the byte piece {name:?} names no byte, expected <0x00> to <0xFF>"))?;
    Ok(&mut bytes[usize::from(byte)])
}

/// Strings by their beginning, byte by byte.
#[derive(Debug, Default)]
struct Trie {
    steps: HashMap<(u32, u8), u32>,
    ends: HashMap<u32, u32>,
    nodes: u32,
}

impl Trie {
    fn insert(&mut self, text: &str, id: u32) {
        let mut at = 0;
        for &byte in text.as_bytes() {
            at = *self.steps.entry((at, byte)).or_insert_with(|| {
                self.nodes += 1;
                self.nodes
            });
        }
        self.ends.insert(at, id);
    }

    fn prefixes<'t>(&'t self, text: &'t [u8]) -> impl Iterator<Item = (usize, u32)> + 't {
        let mut at = Some(0);
        text.iter()
            .enumerate()
            .map_while(move |(i, &byte)| {
                at = self.steps.get(&(at?, byte)).copied();
                at.map(|node| (i + 1, node))
            })
            .filter_map(|(length, node)| self.ends.get(&node).map(|&id| (length, id)))
    }
}
