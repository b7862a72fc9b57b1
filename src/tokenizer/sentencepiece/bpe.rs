//! BPE: characters are merged pair by pair into longer pieces; of all pairs there are, the one whose piece has
//! the best score, of equal ones the leftmost. Source: `bpe_model.cc` of the SentencePiece project.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

use super::pieces::Pieces;
use super::proto::Kind;

/// A stretch of the text and its neighbours.
struct Symbol {
    range: Range<usize>,
    before: Option<usize>,
    after: Option<usize>,
    /// User-defined pieces are never merged.
    frozen: bool,
}

/// Two neighbours that make a piece.
struct Pair {
    left: usize,
    right: usize,
    score: f32,
    bytes: usize,
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Pair {
    /// The pair to merge first is the greatest. Scores are finite.
    fn cmp(&self, other: &Self) -> Ordering {
        let scores = self.score.partial_cmp(&other.score);
        scores.unwrap_or(Ordering::Equal).then(other.left.cmp(&self.left))
    }
}

/// A text on its way.
struct Merging<'a> {
    pieces: &'a Pieces,
    text: &'a str,
    symbols: Vec<Symbol>,
    pairs: BinaryHeap<Pair>,
    /// Where a piece that is no token was put together.
    unused: HashMap<&'a str, usize>,
}

/// Cuts a normalized text into pieces: ranges of its bytes, and ids (the unknown one where there is no piece).
pub fn cut(pieces: &Pieces, text: &str) -> Vec<(Range<usize>, u32)> {
    let mut symbols: Vec<Symbol> = Vec::new();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        let user_defined = pieces.user_defined(&text[at..]);
        let length = user_defined.unwrap_or(first.len_utf8());
        let number = symbols.len();
        symbols.push(Symbol {
            range: at..at + length,
            before: number.checked_sub(1),
            after: (at + length < text.len()).then_some(number + 1),
            frozen: user_defined.is_some(),
        });
        at += length;
    }
    let mut merging = Merging {
        pieces,
        text,
        pairs: BinaryHeap::with_capacity(symbols.len()),
        symbols,
        unused: HashMap::new(),
    };
    for right in 1..merging.symbols.len() {
        merging.offer(Some(right - 1), Some(right));
    }
    merging.run();
    let mut out = Vec::new();
    let mut next = (!merging.symbols.is_empty()).then_some(0);
    while let Some(number) = next {
        let symbol = &merging.symbols[number];
        merging.settle(symbol.range.clone(), &mut out);
        next = symbol.after;
    }
    out
}

impl Merging<'_> {
    /// Notes a pair of neighbours, if it makes a piece.
    fn offer(&mut self, left: Option<usize>, right: Option<usize>) {
        let (Some(left), Some(right)) = (left, right) else {
            return;
        };
        let (a, b) = (&self.symbols[left], &self.symbols[right]);
        if a.frozen || b.frozen {
            return;
        }
        let text = &self.text[a.range.start..b.range.end];
        let Some(piece) = self.pieces.buildable(text).and_then(|id| self.pieces.get(id)) else {
            return;
        };
        if piece.kind == Kind::Unused {
            self.unused.insert(text, a.range.len());
        }
        self.pairs.push(Pair {
            left,
            right,
            score: piece.score,
            bytes: text.len(),
        });
    }

    fn run(&mut self) {
        while let Some(pair) = self.pairs.pop() {
            let (left, right) = (&self.symbols[pair.left].range, &self.symbols[pair.right].range);
            // A pair whose parts were merged with others meanwhile is no longer one.
            if left.is_empty() || right.is_empty() || left.len() + right.len() != pair.bytes {
                continue;
            }
            let (end, after) = (right.end, self.symbols[pair.right].after);
            self.symbols[pair.right].range = end..end;
            let merged = &mut self.symbols[pair.left];
            merged.range.end = end;
            merged.after = after;
            let before = merged.before;
            if let Some(after) = after {
                self.symbols[after].before = Some(pair.left);
            }
            self.offer(before, Some(pair.left));
            self.offer(Some(pair.left), after);
        }
    }

    /// Ids of a finished symbol; pieces that are no tokens are taken apart again.
    fn settle(&self, range: Range<usize>, out: &mut Vec<(Range<usize>, u32)>) {
        let text = &self.text[range.clone()];
        let id = self.pieces.id(text);
        let is_unused = id
            .and_then(|id| self.pieces.get(id))
            .is_some_and(|p| p.kind == Kind::Unused);
        match self.unused.get(text).filter(|_| is_unused) {
            Some(&left) => {
                let middle = range.start + left;
                self.settle(range.start..middle, out);
                self.settle(middle..range.end, out);
            }
            None => out.push((range, id.unwrap_or(self.pieces.unknown()))),
        }
    }
}
