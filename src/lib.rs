//! qtool.
