//! Models on the GPU backend, against what Hugging Face transformers computes. Needs a driver: a real one, or the library
//! that `kernels/cuda/host/build` makes. Without one these tests say that they were skipped; with QTOOL_REQUIRE_CUDA=1 that
//! is a failure.

mod commands;
mod failures;
mod memory;
mod self_check;

use std::io::Write;
use std::sync::Arc;

use qtool::model::{Batch, Model};
use qtool::source::Source;
use qtool_kernels::cuda::probe;
use qtool_kernels::{Backend, CpuBackend, CudaBackend, Isa};

use crate::flow::{quantize, with_recipe};
use crate::forward::{LOGITS, distance, golden, read_golden};
use crate::model::{SAMPLES, sample};

fn gpu(test: &str) -> Option<CudaBackend> {
    match probe(0) {
        Ok(device) => Some(CudaBackend::new(device)),
        Err(reason) => {
            let required = std::env::var_os("QTOOL_REQUIRE_CUDA").is_some_and(|v| v == "1");
            assert!(!required, "QTOOL_REQUIRE_CUDA=1, and {reason}");
            skipped(test, &reason);
            None
        }
    }
}

/// Says so past the test harness, which swallows what a passing test prints.
pub fn skipped(test: &str, reason: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

fn open<B: Backend>(backend: B, folder: &std::path::Path) -> Model<B> {
    let source = Arc::new(Source::open(folder).unwrap());
    Model::open(backend, source).and_then(Model::load).unwrap()
}

#[test]
fn logits_are_the_reference_librarys() {
    let Some(gpu) = gpu("gpu::logits_are_the_reference_librarys") else {
        return;
    };
    for folder in golden() {
        let (model, golden) = (open(gpu.clone(), &folder), read_golden(&folder));
        let logits = model.forward(&Batch::new(&golden.ids)).unwrap();
        let off = distance(&gpu.download(&logits), &golden.logits.concat());
        assert!(off <= LOGITS, "{}: {off:e}", folder.display());
        let most = golden.reply.len().min(4);
        let reply = model.generate(&golden.ids[0], most, &[]).unwrap();
        assert_eq!(reply, golden.reply[..most], "{}", folder.display());
    }
}

#[test]
fn artifacts_give_the_processors_logits() {
    let Some(gpu) = gpu("gpu::artifacts_give_the_processors_logits") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let ids = [vec![1u32, 300, 45, 6, 7, 2000, 11], vec![9, 8, 7]];
    for (i, recipe) in ["bits:8", "bits:4,grid:zp,group:32", "bits:2,effort:fast"]
        .iter()
        .enumerate()
    {
        let out = dir.path().join(i.to_string());
        quantize(&sample(SAMPLES[0]), &with_recipe(&out, recipe, &[], &[]));
        let there = open(gpu.clone(), &out);
        let here = open(CpuBackend::new(Isa::best()), &out);
        let (there, here) = (
            there.forward(&Batch::new(&ids)).unwrap(),
            here.backend().download(&here.forward(&Batch::new(&ids)).unwrap()),
        );
        let off = distance(&gpu.download(&there), &here);
        assert!(off <= 1e-5, "{recipe}: {off:e}");
    }
}
