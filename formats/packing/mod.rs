//! Byte layouts: how codes and scales sit in bytes, one file per layout. Owns where each bit lies;
//! does not own which code a weight gets.

pub mod wint2;
pub mod wint25;
