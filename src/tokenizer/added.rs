//! Tokens that are taken out of a text before it is cut into pieces: special ones, and those a folder adds to
//! its vocabulary. Owns where they are found: at each place the longest, from left to right, as the slow
//! tokenizers of transformers do.

use std::collections::HashMap;

use super::config::AddedToken;

/// A stretch of a text.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'t> {
    /// To be cut into pieces.
    Text(&'t str),
    /// A token by itself.
    Token(u32),
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// By first character, longest first.
    by_first: HashMap<char, Vec<usize>>,
    by_id: HashMap<u32, usize>,
}

impl AddedTokens {
    /// Those of a folder. A token without an id has that of its piece, or the next one after all pieces.
    pub fn new(tokens: &[AddedToken], pieces: usize, piece: &dyn Fn(&str) -> Option<u32>) -> Self {
        let mut all = Self::default();
        let given = tokens.iter().filter_map(|t| t.id).map(|id| id as usize + 1);
        let mut next = given.max().unwrap_or(0).max(pieces) as u32;
        for token in tokens {
            let id = token.id.or_else(|| piece(&token.content)).unwrap_or_else(|| {
                next += 1;
                next - 1
            });
            let number = all.tokens.len();
            if let Some(first) = token.content.chars().next() {
                all.by_first.entry(first).or_default().push(number);
                all.by_id.insert(id, number);
                all.tokens.push(AddedToken {
                    id: Some(id),
                    ..token.clone()
                });
            }
        }
        let tokens = &all.tokens;
        for numbers in all.by_first.values_mut() {
            numbers.sort_by_key(|&n| std::cmp::Reverse(tokens[n].content.len()));
        }
        all
    }

    /// Id of a token.
    pub fn id(&self, content: &str) -> Option<u32> {
        self.tokens.iter().find(|t| t.content == content)?.id
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<&AddedToken> {
        self.by_id.get(&id).map(|&n| &self.tokens[n])
    }

    /// One past the highest id; 0 without tokens.
    pub fn end(&self) -> usize {
        self.by_id.keys().map(|&id| id as usize + 1).max().unwrap_or(0)
    }

    /// The text in stretches; none of them is empty.
    pub fn split<'t>(&self, text: &'t str) -> Vec<Part<'t>> {
        let mut parts = Vec::new();
        let push = |parts: &mut Vec<Part<'t>>, text: &'t str| {
            if !text.is_empty() {
                parts.push(Part::Text(text));
            }
        };
        let (mut from, mut at) = (0, 0);
        while let Some(first) = text[at..].chars().next() {
            let numbers = self.by_first.get(&first).map_or(&[][..], Vec::as_slice);
            let found = numbers
                .iter()
                .map(|&n| &self.tokens[n])
                .find(|t| text[at..].starts_with(&t.content));
            let Some((token, id)) = found.and_then(|t| Some((t, t.id?))) else {
                at += first.len_utf8();
                continue;
            };
            let before = &text[from..at];
            push(&mut parts, if token.lstrip { before.trim_end() } else { before });
            parts.push(Part::Token(id));
            at += token.content.len();
            if token.rstrip {
                at = text.len() - text[at..].trim_start().len();
            }
            from = at;
        }
        push(&mut parts, &text[from..]);
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_token_from_the_left() {
        let token = |content: &str, id, lstrip, rstrip| AddedToken {
            content: content.to_owned(),
            id,
            special: true,
            lstrip,
            rstrip,
        };
        let tokens = [
            token("<a>", Some(7), false, false),
            token("<a>b", None, false, true),
            token("<s>", None, true, false),
        ];
        let added = AddedTokens::new(&tokens, 5, &|text| (text == "<s>").then_some(1));
        assert_eq!(
            (added.id("<a>b"), added.id("<s>"), added.end()),
            (Some(8), Some(1), 9)
        );
        let split = added.split("x <a><a>b  y <s> z");
        let expected = [
            Part::Text("x "),
            Part::Token(7),
            Part::Token(8),
            Part::Text("y"),
            Part::Token(1),
            Part::Text(" z"),
        ];
        assert_eq!(split, expected);
        assert!(added.split("").is_empty());
    }
}
