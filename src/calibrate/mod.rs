//! Calibration: what a model's own inputs say about its weights, gathered while it runs over a text.
//!
//! | Page | Story |
//! |---|---|
//! | [`corpus`] | files to rows of token ids |
//! | [`recorder`] | one block's inputs to sums |
//! | [`activations`] | what lies between two blocks |
//! | [`statistics`] | a folder of sums, and merging parts of it |
//! | [`coverage`] | evidence for a tensor; experts that saw too little |
//! | [`walk`] | all rows through one block after the other |
//! | [`measure`] | the one pass that fills a folder of sums |
//! | [`sequential`] | blocks quantized one after the other |
//! | [`balance`] | scales of input channels, before any code is chosen |
//! | [`pipeline`] | quantization with evidence, whichever way |
//! | [`forecast`] | how long all this will take |
//! | [`sensitivity`] | what each tensor loses at each number of bits |
//! | [`target`] | bits per tensor under a budget |
//! | [`decisions`] | blocks already quantized, in a sequential run |

pub mod activations;
pub mod balance;
pub mod corpus;
pub mod coverage;
pub mod decisions;
pub mod forecast;
pub mod measure;
pub mod pipeline;
pub mod recorder;
pub mod sensitivity;
pub mod sequential;
pub mod statistics;
pub mod target;
pub mod walk;
