//! The encoder against brute force and at its corners.
