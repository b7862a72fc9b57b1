//! Unigram: the sequence of pieces with the highest sum of ln p, by dynamic programming over the bytes of the
//! text. Source: `unigram_model.cc` of the SentencePiece project, whose f32 and f64 roundings are kept.

use std::ops::Range;

use super::pieces::Pieces;
use super::proto::Kind;

/// What an unknown character costs beyond the rarest piece.
const PENALTY: f32 = 10.0;

/// The best way to a place in the text.
#[derive(Clone, Copy)]
struct Best {
    id: u32,
    score: f32,
    from: Option<usize>,
}

/// Cuts a normalized text into pieces: ranges of its bytes, and ids.
pub fn cut(pieces: &Pieces, text: &str) -> Vec<(Range<usize>, u32)> {
    let scores = || pieces.iter().filter(|p| p.kind == Kind::Normal).map(|p| p.score);
    // The library begins its search for the largest score at the smallest positive number.
    let largest = scores().fold(f32::MIN_POSITIVE, f32::max);
    let unknown = scores().fold(f32::MAX, f32::min) - PENALTY;
    let none = Best {
        id: pieces.unknown(),
        score: 0.0,
        from: None,
    };
    let mut best = vec![none; text.len() + 1];
    for (from, first) in text.char_indices() {
        let so_far = best[from].score;
        let mut has_single = false;
        for (length, id) in pieces.prefixes(&text[from..]) {
            let Some(piece) = pieces.get(id) else { continue };
            let score = match piece.kind {
                Kind::Unused => continue,
                Kind::UserDefined => f64::from(length as f32 * largest) - 0.1,
                _ => f64::from(piece.score),
            };
            let score = score + f64::from(so_far);
            let target = &mut best[from + length];
            if target.from.is_none() || score > f64::from(target.score) {
                *target = Best {
                    id,
                    score: score as f32,
                    from: Some(from),
                };
            }
            has_single |= length == first.len_utf8();
        }
        let score = unknown + so_far;
        let target = &mut best[from + first.len_utf8()];
        if !has_single && (target.from.is_none() || score > target.score) {
            *target = Best {
                score,
                from: Some(from),
                ..none
            };
        }
    }
    let mut out = Vec::new();
    let mut end = text.len();
    while let Some(from) = best[end].from {
        out.push((from..end, best[end].id));
        end = from;
    }
    out.reverse();
    out
}
