//! calib.
