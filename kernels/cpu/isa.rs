//! Stand-in until the kernels' own page arrives.

/// Kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IsaKind {
    /// a
    Portable,
    /// b
    Avx2,
    /// c
    Avx512,
}

/// Isa.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(IsaKind);

impl Isa {
    /// new
    pub fn new(kind: IsaKind) -> Option<Isa> {
        let has = match kind {
            IsaKind::Portable => true,
            IsaKind::Avx2 => is_x86_feature_detected!("avx2"),
            IsaKind::Avx512 => is_x86_feature_detected!("avx512bw"),
        };
        has.then_some(Isa(kind))
    }
    /// best
    pub fn best() -> Isa {
        *Self::available().last().unwrap()
    }
    /// all
    pub fn available() -> Vec<Isa> {
        [IsaKind::Portable, IsaKind::Avx2, IsaKind::Avx512].into_iter().filter_map(Isa::new).collect()
    }
    /// kind
    pub fn kind(self) -> IsaKind {
        self.0
    }
}
