//! Every instruction set of this machine against the reference, and against each other bit for bit, at the
//! sizes where blocks, groups and segments begin and end. Each test counts its cases, so that an empty loop
//! cannot pass. This page owns the rows they are tried on; the tests are in the modules.

mod attention;
mod codes;
mod layers;
mod metric;
mod numbers;
mod products;
mod sums;
mod weights;

/// Sizes around the ends of blocks (16), group loops (32, 64, 128), segments (256), and one long row.
const SIZES: [usize; 19] = [
    0,
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    257,
    1000,
    4096 + 3,
];

/// Group lengths: one element, inside a block, across blocks, whole blocks, longer than most rows.
const GROUPS: [usize; 8] = [1, 7, 16, 24, 32, 64, 128, 5000];

/// Reproducible numbers.
struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// Uniform in -1..1.
    fn unit(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    fn small_codes(&mut self, n: usize, distinct: u64) -> Vec<u8> {
        (0..n).map(|_| self.below(distinct) as u8).collect()
    }
}

/// What a row is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Typical,
    Zeros,
    Ties,
    Subnormal,
    Huge,
    MixedFinite,
    NonFinite,
}

const FILLS: [Fill; 7] = [
    Fill::Typical,
    Fill::Zeros,
    Fill::Ties,
    Fill::Subnormal,
    Fill::Huge,
    Fill::MixedFinite,
    Fill::NonFinite,
];

fn row(fill: Fill, n: usize, random: &mut Random) -> Vec<f32> {
    let one = |k: usize| match fill {
        Fill::Typical => random.unit() * 0.1,
        Fill::Zeros => [0.0, -0.0][k % 2],
        Fill::Ties => random.below(41) as f32 - 20.5,
        Fill::Subnormal => f32::from_bits(random.below(1 << 23) as u32 | (random.next() as u32 & 1) << 31),
        Fill::Huge => random.unit() * 1e38,
        Fill::MixedFinite | Fill::NonFinite => match random.below(6) {
            0 => 0.0,
            1 => random.unit() * 1e38,
            2 => random.unit() * 1e-40,
            3 => random.below(41) as f32 - 20.5,
            4 if fill == Fill::NonFinite => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][k % 3],
            _ => random.unit(),
        },
    };
    (0..n).map(one).collect()
}

/// Runs a check on every kind and size of row; returns how many there were.
fn for_each_row(mut check: impl FnMut(&[f32], Fill, &mut Random)) -> usize {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut cases = 0;
    for fill in FILLS {
        for n in SIZES {
            let x = row(fill, n, &mut random);
            check(&x, fill, &mut random);
            cases += 1;
        }
    }
    cases
}

/// The bit pattern, with all NaN alike.
fn bits(x: f32) -> u32 {
    if x.is_nan() {
        f32::NAN.to_bits()
    } else {
        x.to_bits()
    }
}

/// f32 results that must be equal, all NaN alike.
fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (k, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(
            bits(got),
            bits(expected),
            "{what}: element {k}: {got} and {expected}"
        );
    }
}
