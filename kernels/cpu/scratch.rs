//! Buffers that a thread keeps from one call to the next. Owns them; what lies in them is the borrower's.

use std::cell::Cell;

thread_local! {
    static BUFFERS: Cell<Vec<Vec<f32>>> = const { Cell::new(Vec::new()) };
}

/// Runs `f` with `N` buffers of these lengths, whose contents are whatever was left in them.
pub(super) fn with<const N: usize, R>(lengths: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    let mut buffers = BUFFERS.take();
    buffers.resize_with(N.max(buffers.len()), Vec::new);
    let mut rest = buffers.iter_mut();
    let slices = lengths.map(|len| {
        let buffer = rest.next().expect("as many buffers as lengths");
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        &mut buffer[..len]
    });
    let result = f(slices);
    BUFFERS.set(buffers);
    result
}
