//! What a finished quantization looks like on a terminal: the table of classes, and the faults found.

use qtool_formats::artifact::{Manifest, Stored};

use super::size;
use crate::classes::{class_of, group};
use crate::plan::QuantizePlan;
use crate::table::Table;

/// Tensors with their faults.
pub fn faults(manifest: &Manifest) -> Vec<(&str, &str)> {
    let quantized = manifest.tensors.iter().filter_map(|t| match &t.stored {
        Stored::Quantized(q) => Some((t.name.as_str(), &q.faults)),
        Stored::Kept { .. } => None,
    });
    quantized
        .flat_map(|(name, faults)| faults.iter().map(move |fault| (name, fault.as_str())))
        .collect()
}

/// The table, one line a class of tensors with the same fate.
pub fn outcome_table(manifest: &Manifest, plan: &QuantizePlan) -> String {
    let mut table = Table::new(&[
        ">tensors",
        "class",
        "stored as",
        ">before",
        ">after",
        ">bits/w",
        ">SQNR dB",
        ">worst",
    ]);
    let pairs = manifest.tensors.iter().zip(&plan.tensors);
    let groups = group(pairs, |(record, planned)| {
        (class_of(&record.name), planned.outcome())
    });
    for (class, outcome, members) in groups {
        let figures: Vec<_> = members
            .iter()
            .filter_map(|(record, _)| match &record.stored {
                Stored::Quantized(q) => Some(&q.figures),
                Stored::Kept { .. } => None,
            })
            .collect();
        let sqnr: Vec<f64> = figures.iter().filter_map(|f| f.sqnr_db).collect();
        let worst = sqnr.iter().copied().fold(f64::INFINITY, f64::min);
        let mean = sqnr.iter().sum::<f64>() / sqnr.len() as f64;
        let text = |value: f64| {
            if sqnr.is_empty() {
                String::new()
            } else {
                format!("{value:.1}")
            }
        };
        table.row([
            members.len().to_string(),
            class,
            outcome,
            size::bytes(members.iter().map(|(_, p)| p.source_bytes).sum()),
            size::bytes(members.iter().map(|(_, p)| p.stored_bytes()).sum()),
            figures
                .first()
                .map(|f| format!("{:.2}", f.bits_per_weight))
                .unwrap_or_default(),
            text(mean),
            text(worst),
        ]);
    }
    table.render()
}
