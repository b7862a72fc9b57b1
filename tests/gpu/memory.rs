//! GPU memory under a budget: models that do not fit give the same results, weights being brought in as they are used;
//! budgets that nothing fits in are refused in a sentence.

use std::sync::Arc;

use qtool::model::{Batch, Model};
use qtool::source::Source;
use qtool_kernels::cuda::open;
use qtool_kernels::{Backend, CudaBackend};

use super::commands::Bench;
use super::gpu;
use crate::forward::{distance, golden, read_golden};

fn within(budget: usize) -> CudaBackend {
    CudaBackend::new(open(0, Some(budget)).unwrap())
}

#[test]
fn a_model_larger_than_the_budget_gives_equal_logits() {
    let Some(ample) = gpu("gpu::memory::a_model_larger_than_the_budget_gives_equal_logits") else {
        return;
    };
    let mut streamed = 0;
    let folders = golden();
    let chosen = ["llama", "qwen3", "ernie45-moe"];
    let folders = folders
        .iter()
        .filter(|f| chosen.iter().any(|name| f.ends_with(name)));
    for folder in folders {
        let golden = read_golden(folder);
        let batch = Batch::new(&golden.ids);
        let run = |gpu: &CudaBackend| -> qtool::Result<(Vec<f32>, usize)> {
            let source = Arc::new(Source::open(folder)?);
            let model = Model::open(gpu.clone(), source)?.load()?;
            let weights = gpu.device().memory().used;
            let mut values = Vec::new();
            for _ in 0..2 {
                values = gpu.read(&model.forward(&batch)?)?;
            }
            Ok((values, weights))
        };
        let before = ample.device().memory();
        let (whole, weights) = run(&ample).unwrap();
        let after = ample.device().memory();
        assert_eq!(after.fetched, before.fetched, "everything fits");
        assert_eq!(after.used, before.used, "all of it was given back");
        // Less and less, down to a budget that no layer fits in.
        let mut refused = None;
        for share in [90, 50, 30, 15, 1] {
            let gpu = within(weights * share / 100);
            match run(&gpu) {
                Ok((values, _)) => {
                    assert!(refused.is_none(), "{share} % are enough, and more were not");
                    let off = distance(&values, &whole);
                    assert!(off == 0.0, "{}: {share} %: {off:e}", folder.display());
                    let memory = gpu.device().memory();
                    assert!(memory.most <= memory.budget, "{memory:?}");
                    if share <= 50 {
                        assert!(
                            memory.fetched > 0 && (share < 50 || memory.foreseen > 0),
                            "{memory:?}"
                        );
                        streamed += 1;
                    }
                }
                Err(error) => refused = Some(error.to_string()),
            }
        }
        let refused = refused.unwrap();
        for part in ["do not fit a budget of", "--device-memory", "--device cpu"] {
            assert!(refused.contains(part), "{refused}");
        }
    }
    assert!(streamed >= 2, "{streamed}");
}

#[test]
fn commands_take_a_budget() {
    let Some(_) = gpu("gpu::memory::commands_take_a_budget") else {
        return;
    };
    let bench = Bench::new(2);
    let line = |memory: &str, out: &str| {
        format!(
            "calibrate model --data ids.jsonl --rows 8 --length 4 --device cuda --device-memory {memory} -o {out}"
        )
    };
    for (memory, out) in [("1GiB", "ample"), ("2400kB", "scarce")] {
        let output = bench.run(&line(memory, out), &[]);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let files = |out: &str| super::commands::files(&bench.at(out));
    assert_eq!(files("scarce"), files("ample"));
    let output = bench.run(&line("200kB", "none"), &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("do not fit a budget of 1 MiB") && said.contains("--device-memory"),
        "{said}"
    );
    assert!(said.lines().count() == 1 && !bench.at("none").exists(), "{said}");
}
