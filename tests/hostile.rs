//! Files that lie. Whatever the bytes, reading ends in a sentence that names the file, the tensor
//! where there is one, and what is wrong; never in a panic, never in a tensor outside its file.
//!
//! Every table says how many cases it must have run, so that an empty table cannot pass.

mod folder;
mod header;
mod manifest;
mod program;

/// Asserts that `message` is one line and holds every fragment.
#[track_caller]
fn assert_says(message: &str, fragments: &[&str]) {
    for fragment in fragments {
        assert!(
            message.contains(fragment),
            "{message:?} should contain {fragment:?}"
        );
    }
    assert!(
        !message.chars().any(char::is_control),
        "{message:?} holds control characters"
    );
}
