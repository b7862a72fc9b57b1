//! What `quantize --dry-run --calib` says of the calibration.

use std::time::Duration;

use super::size;
use crate::calibrate::forecast::Forecast;

/// One line for people.
pub fn line(forecast: &Forecast) -> String {
    let seconds = |s: f64| size::seconds(Duration::from_secs_f64(s));
    format!(
        "Calibrating on {} rows, {} tokens: about {} to run the model and {} to choose codes by it (timed on a sample); statistics of {}\n",
        forecast.rows,
        forecast.tokens,
        seconds(forecast.forward_seconds),
        seconds(forecast.choose_seconds),
        size::bytes(forecast.statistics_bytes),
    )
}
