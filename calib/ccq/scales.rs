//! The stored scales of a channel for a given pair: one super scale, a 4-bit local scale per group, and the
//! codes that go with them. Owns their joint choice and the alternation of codes and scales.

use qtool_formats::packing::wint2::{MAX_LOCAL, VECTORS_PER_GROUP};
use qtool_kernels::Isa;

use super::Book;
use super::race::Plan;
use super::row::{Found, Row};

/// A complete encoding, in visiting order and units of the scaled row.
#[derive(Debug, Clone)]
pub(super) struct Fitted {
    pub(super) pair: (u16, u16),
    pub(super) super_scale: f32,
    pub(super) local: Vec<u8>,
    pub(super) codes: Vec<u8>,
    pub(super) error: f64,
}

/// Working memory.
#[derive(Debug, Default)]
pub(super) struct Fit {
    /// The super scale that least squares asked for last, before it was rounded: the GPU's must be the same to the bit.
    pub(super) asked: f32,
    scale: Vec<f32>,
    found: Found,
}

/// Super scales tried reach down to the median group's scale over 15, divided by this.
const SPREAD: f32 = 1.1;
/// How much larger (relatively) an error may be for a super scale with which both arithmetics agree.
const AGREEMENT: f64 = 2e-4;

impl Fit {
    pub(super) fn run(&mut self, row: &Row, isa: Isa, book: &Book, plan: Plan) -> Fitted {
        let mut short: Vec<(f64, f32)> = candidates(row)
            .into_iter()
            .map(|s| (forecast(row, s), s))
            .collect();
        short.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
        short.truncate(plan.supers);
        let mut best: Option<Fitted> = None;
        for (_, super_scale) in short {
            let start: Vec<u8> = (0..row.groups())
                .map(|g| nearest_local(row, g, super_scale).0)
                .collect();
            let fitted = self.locals(row, isa, book, super_scale, &start);
            if best.as_ref().is_none_or(|best| fitted.error < best.error) {
                best = Some(fitted);
            }
        }
        let empty = || Fitted {
            pair: book.pair,
            super_scale: 0.0,
            local: vec![0; row.groups()],
            codes: vec![0; row.groups() * VECTORS_PER_GROUP],
            error: row.energy().iter().sum(),
        };
        let agreeing = best.unwrap_or_else(empty);
        let mut free = agreeing.clone();
        for _ in 0..plan.rounds {
            let wanted = row
                .least_squares(book, &free.local, &free.codes)
                .unwrap_or(free.super_scale);
            self.asked = wanted;
            let wanted = row.storable(wanted);
            if wanted == free.super_scale || wanted <= 0.0 {
                break;
            }
            let next = self.locals(row, isa, book, wanted, &free.local);
            if next.error >= free.error {
                break;
            }
            free = next;
        }
        if free.error < agreeing.error * (1.0 - AGREEMENT) {
            free
        } else {
            agreeing
        }
    }

    /// The best local scale of each group near `start`, and its codes.
    fn locals(&mut self, row: &Row, isa: Isa, book: &Book, super_scale: f32, start: &[u8]) -> Fitted {
        let groups = row.groups();
        let mut fitted = Fitted {
            pair: book.pair,
            super_scale,
            local: vec![0; groups],
            codes: vec![0; groups * VECTORS_PER_GROUP],
            error: 0.0,
        };
        let mut best = vec![0.0_f32; groups];
        for offset in [0_i32, 1, -1] {
            let tried = start
                .iter()
                .map(|&l| (i32::from(l) + offset).clamp(0, i32::from(MAX_LOCAL)) as u8);
            self.scale.clear();
            self.scale
                .extend(tried.clone().map(|local| f32::from(local) * super_scale));
            row.search(isa, book, 0..groups, &self.scale, &mut self.found);
            for (g, (best, local)) in best.iter_mut().zip(tried).enumerate() {
                if self.found.gains[g] > *best {
                    *best = self.found.gains[g];
                    self.take(&mut fitted, g, g, local);
                }
            }
        }
        for (g, best) in best.iter_mut().enumerate() {
            // Walk on where the best lies at an end of the three.
            let direction = i32::from(fitted.local[g]) - i32::from(start[g]);
            while *best > 0.0 && direction != 0 {
                let next = i32::from(fitted.local[g]) + direction.signum();
                if !(1..=i32::from(MAX_LOCAL)).contains(&next) {
                    break;
                }
                row.search(isa, book, g..g + 1, &[next as f32 * super_scale], &mut self.found);
                if self.found.gains[0] <= *best {
                    break;
                }
                *best = self.found.gains[0];
                self.take(&mut fitted, g, 0, next as u8);
            }
        }
        fitted.error = row.energy().iter().sum::<f64>() - best.iter().map(|g| f64::from(*g)).sum::<f64>();
        fitted
    }

    fn take(&self, fitted: &mut Fitted, g: usize, from: usize, local: u8) {
        let part = |g: usize| g * VECTORS_PER_GROUP..(g + 1) * VECTORS_PER_GROUP;
        fitted.local[g] = local;
        fitted.codes[part(g)].copy_from_slice(&self.found.codes[part(from)]);
    }
}

/// Super scales of at most 4 significant bits, with which `local * super` is exact in bf16 and the two serving
/// arithmetics agree, from the largest group at full local scale down to the median group at it.
fn candidates(row: &Row) -> Vec<f32> {
    let mut scales: Vec<f32> = row.scale().iter().copied().filter(|s| *s > 0.0).collect();
    scales.sort_by(f32::total_cmp);
    let (Some(&largest), Some(&median)) = (scales.last(), scales.get(scales.len() / 2)) else {
        return vec![];
    };
    let full = f32::from(MAX_LOCAL);
    let mut candidate = four_bits(2.0 * largest / full);
    let least = median / full / SPREAD;
    let mut all = Vec::new();
    while candidate >= least && all.len() < 128 {
        let storable = row.storable(candidate);
        if storable > 0.0 && all.last() != Some(&storable) {
            all.push(storable);
        }
        candidate = four_bits(candidate * 0.99);
    }
    all
}

/// `x` with all but its 4 highest significant bits cleared.
fn four_bits(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0xFFF0_0000)
}

/// The local scale nearest to a group's best in the sense of [`excess`], and that excess.
fn nearest_local(row: &Row, g: usize, super_scale: f32) -> (u8, f64) {
    let wanted = row.scale()[g];
    if wanted <= 0.0 {
        return (0, 0.0);
    }
    let below = (wanted / super_scale).floor().clamp(0.0, f32::from(MAX_LOCAL)) as u8;
    let mut best = (0, 1.0);
    for local in [below, below + 1] {
        if (1..=MAX_LOCAL).contains(&local) {
            let excess = excess(f32::from(local) * super_scale / wanted);
            if excess < best.1 {
                best = (local, excess);
            }
        }
    }
    best
}

/// Error beyond the best, relative to the group's energy, at `ratio` times the best scale: grain grows with
/// the square of the scale, clipping with the inverse square.
fn excess(ratio: f32) -> f64 {
    let square = f64::from(ratio * ratio);
    0.052 * (square + 1.0 / square) - 0.104
}

/// What error beyond the best to expect of a super scale.
fn forecast(row: &Row, super_scale: f32) -> f64 {
    row.energy()
        .iter()
        .enumerate()
        .map(|(g, e)| e * nearest_local(row, g, super_scale).1)
        .sum()
}
