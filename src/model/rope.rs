//! Rotary angles as a model's config asks for them. Owns the frequencies and their scaling; turning heads by
//! them is a kernel.
//!
//! ```text
//! frequency i of D/2:  theta^(-2 i / D), in f32;   angle = position * frequency
//! linear               frequency / factor
//! llama3               as linear for wavelengths above old_context / low, as is below old_context / high,
//!                      blended in between (Llama 3.1's release notes and Hugging Face's `rope_utils`)
//! divided              frequency i / divisor i, each given: how GGUF files keep any of these
//! ```

use qtool_kernels::backend::{RopeStyle, RopeTable};
use serde_json::Value;

/// Frequencies of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which columns turn together.
    pub style: RopeStyle,
    /// (D/2)
    frequencies: Vec<f32>,
}

impl Rope {
    /// From `config.json`; `Err` names what is not supported.
    pub fn new(config: &Value, style: RopeStyle, head_dim: usize) -> Result<Self, String> {
        let modern = config.get("rope_parameters").filter(|p| p.is_object());
        let scaling = modern.or_else(|| config.get("rope_scaling").filter(|p| p.is_object()));
        let number = |key: &str| scaling?.get(key)?.as_f64();
        let theta = number("rope_theta")
            .or_else(|| config.get("rope_theta")?.as_f64())
            .unwrap_or(10_000.0);
        let half = head_dim / 2;
        let plain = |i: usize| theta.powf(-((2 * i) as f64) / head_dim as f64) as f32;
        let mut frequencies: Vec<f32> = (0..half).map(plain).collect();
        let kind = scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type")));
        let factor = number("factor").unwrap_or(1.0) as f32;
        match kind.and_then(Value::as_str).unwrap_or("default") {
            "default" => {}
            "linear" => frequencies.iter_mut().for_each(|f| *f /= factor),
            "llama3" => {
                let context = number("original_max_position_embeddings").unwrap_or(8192.0) as f32;
                let low = number("low_freq_factor").unwrap_or(1.0) as f32;
                let high = number("high_freq_factor").unwrap_or(4.0) as f32;
                for f in &mut frequencies {
                    let wavelength = std::f32::consts::TAU / *f;
                    if wavelength > context / low {
                        *f /= factor;
                    } else if wavelength >= context / high {
                        let blend = (context / wavelength - low) / (high - low);
                        *f = (1.0 - blend) * *f / factor + blend * *f;
                    }
                }
            }
            "divided" => {
                let divisors = scaling.and_then(|s| s.get("divisors")?.as_array());
                let divisors: Vec<f64> = divisors.into_iter().flatten().filter_map(Value::as_f64).collect();
                if divisors.len() != half || !divisors.iter().all(|d| *d > 0.0) {
                    return Err(format!(
                        "expected {half} positive divisors of rotary frequencies, got {}",
                        divisors.len()
                    ));
                }
                for (f, divisor) in frequencies.iter_mut().zip(divisors) {
                    *f /= divisor as f32;
                }
            }
            other => {
                return Err(format!(
                    "rotary scaling {other:?} is not supported; supported are default, linear and llama3"
                ));
            }
        }
        Ok(Self { style, frequencies })
    }

    /// The table of positions `from..to`: its row 0 is position `from`.
    pub fn table(&self, from: u32, to: u32) -> RopeTable {
        let angles = (from..to).flat_map(|p| self.frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let (sin, cos) = angles.map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
        RopeTable {
            style: self.style,
            half: self.frequencies.len(),
            cos,
            sin,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn frequencies_by_hand() {
        let rope = |config: Value| Rope::new(&config, RopeStyle::Halves, 4);
        assert_eq!(
            rope(json!({"rope_theta": 100.0})).unwrap().frequencies,
            [1.0, 0.1]
        );
        let scaled = json!({"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0}});
        assert_eq!(rope(scaled).unwrap().frequencies, [0.5, 0.05]);
        let modern = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}});
        assert_eq!(rope(modern).unwrap().frequencies, [1.0, 0.1]);
        let divided =
            json!({"rope_theta": 100.0, "rope_scaling": {"rope_type": "divided", "divisors": [1.0, 4.0]}});
        assert_eq!(rope(divided).unwrap().frequencies, [1.0, 0.025]);
        let short = rope(json!({"rope_scaling": {"rope_type": "divided", "divisors": [1.0]}}));
        assert!(short.unwrap_err().contains("2 positive divisors"));
        let refused = rope(json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}));
        assert!(refused.unwrap_err().contains("yarn"));
        let table = rope(json!({"rope_theta": 100.0})).unwrap().table(3, 5);
        assert_eq!((table.cos.len(), table.cos[0]), (4, 3f64.cos() as f32));
    }
}
