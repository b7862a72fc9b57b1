//! `qtool quantize`: what was typed, the plan and the outcome as printed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use console::style;
use qtool_calib::options::{
    PartialOptions, parse_clip, parse_effort, parse_grid, parse_grouping, parse_method, parse_scale,
    parse_scale_bits,
};
use qtool_calib::{METHODS, Recipe};
use qtool_formats::artifact::Manifest;
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::export::fastdeploy::Wanted;
use serde_json::{Value, json};

use super::cache::Cache;
use super::device::{self, DeviceArgs};
use super::outcome::{faults, outcome_table};
use super::planned::{PlanClass, of_ranks, plan_classes, totals_line};
use super::transform::{TransformArgs, untied_line};
use super::{corpus, print, print_json, size, target, wants_progress};
use crate::calibrate::pipeline::Calibration;
use crate::calibrate::target::Allocated;
use crate::calibrate::{forecast, pipeline};
use crate::device::{Chosen, Device, encoding};
use crate::estimate;
use crate::fastdeploy::Request;
use crate::informed::Codes;
use crate::plan::QuantizePlan;
use crate::quantize::{self, NonFinite, Options};
use crate::table::Table;

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Args {
    /// A model folder (model.safetensors or shards with their index) or a .safetensors file
    pub model: PathBuf,
    /// Folder to create
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// Bits per weight: 8, 4, or 2 (WINT2)
    #[arg(short, long, value_name = "BITS", value_parser = qtool_calib::options::parse_bits, required_unless_present = "target_bpw")]
    pub bits: Option<u8>,
    #[command(flatten)]
    target: target::TargetArgs,
    /// Folder to write: qtool's artifact, or one that FastDeploy loads (ERNIE-4.5)
    #[arg(long, value_enum, default_value_t = Format::Qtool)]
    pub format: Format,
    /// FastDeploy, --bits 2: experts up to this layer get INT4 instead of 2 bits [default: none]
    #[arg(long, value_name = "LAYER")]
    pub w4_until: Option<usize>,
    /// FastDeploy: ranks of tensor parallelism; above 1, OUT gets a folder per rank
    #[arg(long, value_name = "RANKS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub tensor_parallel: u16,
    /// FastDeploy, dense models: write scales of a quantized key-value cache of this type
    #[arg(long, value_enum, value_name = "TYPE", requires = "calib")]
    pub kv_cache: Option<Cache>,
    /// Columns that share a scale: 16 to 512, or "row" [default: row at 8 bits, 64 at 4]
    #[arg(short, long, value_name = "N")]
    pub group_size: Option<String>,
    /// Store a zero point per group instead of centring the grid on zero
    #[arg(long)]
    pub asymmetric: bool,
    /// How scales are chosen: none or mse [default: none at 8 bits, mse at 4]
    #[arg(long, value_name = "METHOD")]
    pub clip: Option<String>,
    /// How codes are chosen: none, mse, gptq, ccq, ccq25 (WINT2.5), nf4, nf4-dq (double quantization), q4-k or q2-k (GGML's) [default: as --clip; with --calib gptq; at 2 bits ccq]
    #[arg(long, value_name = "METHOD", conflicts_with = "clip")]
    pub method: Option<String>,
    #[command(flatten)]
    evidence: corpus::EvidenceArgs,
    #[command(flatten)]
    transform: TransformArgs,
    /// How long to search at 2 bits: fast, default or best [default: default]
    #[arg(long, value_name = "LEVEL")]
    pub effort: Option<String>,
    /// Type scales are stored in: bf16, f16 or f32 [default: bf16]
    #[arg(long, value_name = "DTYPE")]
    pub scale_dtype: Option<String>,
    /// Significant bits of a scale, for formats that store its product with a zero point; 7 for GGUF's Q4_1 [default: all of its type]
    #[arg(long, value_name = "N", value_parser = parse_scale_bits)]
    pub scale_bits: Option<u8>,
    /// Options of the tensors whose name matches, e.g. 'down_proj=bits:8'; the first match decides
    #[arg(long = "rule", value_name = "REGEX=OPTIONS")]
    pub rules: Vec<String>,
    /// Keep the tensors whose name matches as they are
    #[arg(long = "skip", value_name = "REGEX")]
    pub skips: Vec<String>,
    /// What to do with a tensor that holds NaN or infinity
    #[arg(long, value_enum, default_value_t = OnNonFinite::Refuse)]
    pub non_finite: OnNonFinite,
    /// Most tensor data in one file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size::parse)]
    pub max_shard_size: u64,
    #[command(flatten)]
    device: DeviceArgs,
    /// Worker threads; 0 means one per core. The artifact's bytes do not depend on it
    #[arg(short = 'j', long, default_value_t = 0)]
    pub threads: usize,
    /// Print the plan with sizes and a time estimate, and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Replace the folder when qtool wrote it
    #[arg(long)]
    pub force: bool,
    /// Print the plan or the outcome as JSON
    #[arg(long)]
    pub json: bool,
    /// No progress line
    #[arg(short, long)]
    pub quiet: bool,
}

/// Warnings printed before the rest is only counted.
const SHOWN: usize = 20;

/// `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// qtool's own artifact
    Qtool,
    /// A folder PaddlePaddle FastDeploy loads, with qtool.json beside
    Fastdeploy,
}

/// `--non-finite`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnNonFinite {
    /// Stop, naming tensor and index
    Refuse,
    /// Copy such tensors unquantized
    Keep,
}

fn after_help() -> String {
    let methods: Vec<String> = METHODS
        .iter()
        .map(|m| format!("  {:<6}{}", m.name, m.summary))
        .collect();
    format!(
        "\
Embeddings, norms, output heads, routers, biases and everything that is no float matrix stay as
they are unless a --rule names them. Rules: bits:8|4|3|2, group:N|row, grid:sym|narrow|zp, clip:none|mse,
method:none|mse|gptq|ccq, scale:bf16|f16|f32, scale-bits:N, effort:fast|default|best, in any number, separated by commas; or keep.

Methods:
{}

Examples:
  qtool quantize MODEL -o OUT --bits 4
  qtool quantize MODEL -o OUT --bits 4 --group-size 32 --asymmetric --scale-dtype f16
  qtool quantize MODEL -o OUT --bits 4 --rule 'down_proj=bits:8' --skip 'layers\\.0\\.'
  qtool quantize MODEL -o OUT --bits 8 --dry-run
  qtool quantize MODEL -o OUT --bits 2 --calib text.txt --rotate
  qtool quantize MODEL -o OUT --target-bpw 3 --calib STATS
  qtool quantize ERNIE -o OUT --bits 4 --format fastdeploy",
        methods.join("\n")
    )
}

impl Args {
    /// Plans, and unless it is a dry run, quantizes.
    pub fn run(&self) -> anyhow::Result<i32> {
        let started = Instant::now();
        let mut options = self.options()?;
        let chosen = self.device.choose()?;
        options.device = chosen.device.clone();
        let checkpoint = Arc::new(Checkpoint::open(&self.model)?);
        let unmatched = options.recipe.unmatched(&checkpoint.names().collect::<Vec<_>>());
        if let Some(pattern) = unmatched.first() {
            anyhow::bail!(
                "{pattern:?} matches no tensor of {}; `qtool inspect --all` lists their names",
                self.model.display()
            );
        }
        // A target needs the evidence now; without one, what cannot be done is refused before a text is read.
        let mut calibration = None;
        if self.target.given() {
            calibration = self.evidence.read(&self.model)?;
        }
        let coverage = self.evidence.rows.min_coverage;
        let applied = self.target.apply(
            &checkpoint,
            (&mut options, self.effort.as_deref()),
            &mut calibration,
            coverage,
        )?;
        let mut plans = match self.format {
            Format::Qtool => vec![self.transform.plan(&checkpoint, &options)?],
            Format::Fastdeploy => self
                .transform
                .fastdeploy_plans(&checkpoint, &self.request(&options)?)?,
        };
        if calibration.is_none() {
            calibration = self.evidence.read(&self.model)?;
        }
        let moved = encoding::move_to(&chosen.device, &mut plans)?;
        if self.dry_run {
            qtool_formats::replace::check_target(&self.output, self.force)?;
            return self.print_plan(
                &checkpoint,
                &plans,
                (calibration.as_ref(), &chosen.device),
                (&options.recipe, applied.allocated.as_ref()),
            );
        }
        let manifests = match calibration {
            None => {
                let staging = quantize::begin(&checkpoint, &options)?;
                quantize::write_folders(&checkpoint, &plans, &options, Codes::Plain, staging)?
            }
            Some(calibration) => {
                options.calibration = Some(target::noted(
                    calibration.describe(coverage)?,
                    applied.allocated.as_ref(),
                ));
                let balanced =
                    self.transform
                        .balanced(&checkpoint, plans, &options, calibration, coverage)?;
                let (calibration, _scratch);
                (plans, calibration, _scratch) = balanced;
                pipeline::run(&checkpoint, &mut plans, &options, &calibration, coverage)?
            }
        };
        let (manifest, plan) = (&manifests[0], &plans[0]);
        self.print_outcome(manifest, plan, plans.len(), (started.elapsed(), &chosen, moved))?;
        Ok(0)
    }

    /// Bits of tensors that nothing else decides on.
    fn bits(&self) -> u8 {
        self.bits.unwrap_or(target::DEFAULT_BITS)
    }

    /// What was typed, as what it means.
    fn options(&self) -> anyhow::Result<Options> {
        if self.format == Format::Qtool
            && (self.w4_until.is_some() || self.tensor_parallel > 1 || self.kv_cache.is_some())
        {
            anyhow::bail!("--w4-until, --tensor-parallel and --kv-cache go with --format fastdeploy only");
        }
        self.transform.check(
            self.format == Format::Fastdeploy,
            self.target.given(),
            self.non_finite == OnNonFinite::Keep,
        )?;
        if self.format == Format::Fastdeploy && self.target.given() {
            anyhow::bail!(
                "--target-bpw does not go with --format fastdeploy: its layout leaves no choice but --bits and --w4-until, which gives all experts up to a layer 4 bits instead of 2"
            );
        }
        // Under a target it is for those tensors that get WINT2.
        let effort = self.effort.as_deref().filter(|_| !self.target.given());
        let partial = PartialOptions {
            bits: Some(self.bits()),
            grouping: self.group_size.as_deref().map(parse_grouping).transpose()?,
            grid: if self.asymmetric {
                Some(parse_grid("zp")?)
            } else {
                None
            },
            method: self.method()?,
            scale: self.scale_dtype.as_deref().map(parse_scale).transpose()?,
            scale_bits: self.scale_bits,
            effort: effort.map(parse_effort).transpose()?,
            calibrated: !self.evidence.calib.is_empty(),
        };
        let default = match self.format {
            Format::Qtool => partial.complete(self.bits())?,
            // The recipe decides nothing there.
            Format::Fastdeploy => PartialOptions::default().complete(self.bits())?,
        };
        Ok(Options {
            target: self.output.clone(),
            force: self.force,
            recipe: Recipe::new(default, &self.skips, &self.rules)?,
            non_finite: match self.non_finite {
                OnNonFinite::Refuse => NonFinite::Refuse,
                OnNonFinite::Keep => NonFinite::Keep,
            },
            max_shard_bytes: self.max_shard_size,
            threads: self.threads,
            device: Device::default(),
            show_progress: wants_progress(self.json, self.quiet),
            calibration: None,
        })
    }

    /// The method that was typed, under either name.
    fn method(&self) -> anyhow::Result<Option<&'static str>> {
        let clip = self.clip.as_deref().map(parse_clip).transpose()?;
        Ok(self.method.as_deref().map(parse_method).transpose()?.or(clip))
    }

    /// What is asked of a FastDeploy folder. Its layout leaves most choices to no one.
    fn request(&self, options: &Options) -> anyhow::Result<Request> {
        let rules = !self.rules.is_empty() || !self.skips.is_empty();
        let refused = [
            (
                "--group-size",
                self.group_size
                    .as_deref()
                    .is_some_and(|group| group.trim() != "row"),
            ),
            ("--asymmetric", self.asymmetric),
            (
                "--scale-dtype",
                self.scale_dtype
                    .as_deref()
                    .is_some_and(|dtype| dtype.trim() != "bf16"),
            ),
            ("--scale-bits", self.scale_bits.is_some()),
            (
                "--effort without --bits 2",
                self.effort.is_some() && self.bits() != 2,
            ),
            ("--rule and --skip", rules),
            ("--non-finite keep", self.non_finite == OnNonFinite::Keep),
        ];
        if let Some((option, _)) = refused.iter().find(|(_, typed)| *typed) {
            anyhow::bail!(
                "{option} does not go with --format fastdeploy: it loads symmetric codes with one BF16 scale per output channel in every linear weight; leave {option} out, or leave --format out for qtool's own artifact"
            );
        }
        Ok(Request {
            wanted: Wanted {
                bits: self.bits(),
                w4_until: self.w4_until,
            },
            ranks: usize::from(self.tensor_parallel),
            method: self.method()?,
            calibrated: !self.evidence.calib.is_empty(),
            effort: self.effort.as_deref().map(parse_effort).transpose()?,
            max_shard_bytes: options.max_shard_bytes,
            kv_cache: self.kv_cache.map(Cache::meaning),
        })
    }

    fn print_plan(
        &self,
        checkpoint: &Arc<Checkpoint>,
        plans: &[QuantizePlan],
        (calibration, device): (Option<&Calibration>, &Device),
        (recipe, allocated): (&Recipe, Option<&Allocated>),
    ) -> anyhow::Result<i32> {
        let (plan, ranks) = (&plans[0], plans.len());
        let calibration = calibration
            .map(|c| forecast::forecast(checkpoint, plans, c, (device, self.threads)))
            .transpose()?;
        let estimate = estimate::estimate(checkpoint, plan, self.threads)?;
        let classes = plan_classes(plan);
        if self.json {
            let classes: Vec<Value> = classes.iter().map(PlanClass::json).collect();
            print_json(&json!({
                "model": self.model,
                "output": self.output,
                "ranks": ranks,
                "source_bytes": plan.source_bytes(),
                "stored_bytes": plan.stored_bytes(),
                "untied_head_bytes": plan.untied_bytes(),
                "estimate": estimate,
                "estimated_seconds": estimate.total_seconds(),
                "calibration": calibration,
                "options": recipe.default_options().to_string(),
                "rules": recipe.describe(),
                "classes": classes,
                "allocation": allocated,
            }))?;
            return Ok(0);
        }
        let mut table = Table::new(&[">tensors", "class", "becomes", ">before", ">after"]);
        for class in &classes {
            table.row([
                class.tensors.to_string(),
                class.class.clone(),
                class.outcome.clone(),
                size::bytes(class.before),
                size::bytes(class.after),
            ]);
        }
        print(&format!(
            "Plan for {}{} (nothing is written):\n{}\n{}{}{}{}",
            self.model.display(),
            of_ranks(ranks),
            table.render(),
            self.options_line(recipe),
            untied_line(plan),
            allocated.map(target::table).unwrap_or_default(),
            totals_line(plan, &estimate)
                + &calibration
                    .as_ref()
                    .map(super::forecast::line)
                    .unwrap_or_default()
        ))?;
        Ok(0)
    }

    /// What tensors get that no rule speaks of, in the words of rules; nothing where something else decides that.
    fn options_line(&self, recipe: &Recipe) -> String {
        if self.target.given() || self.format == Format::Fastdeploy {
            return String::new();
        }
        format!(
            "Options where no rule says otherwise: {}\n",
            recipe.default_options()
        )
    }

    fn print_outcome(
        &self,
        manifest: &Manifest,
        plan: &QuantizePlan,
        ranks: usize,
        (time, chosen, moved): (Duration, &Chosen, usize),
    ) -> anyhow::Result<()> {
        let faulty: Vec<(&str, &str)> = faults(manifest);
        if self.json {
            print_json(&json!({
                "output": self.output,
                "ranks": ranks,
                "source_bytes": plan.source_bytes(),
                "stored_bytes": plan.stored_bytes(),
                "seconds": time.as_secs_f64(),
                "device": chosen.device.name(),
                "encoded_on_device": moved,
                "device_reason": chosen.reason,
                "totals": manifest.totals,
                "faults": faulty.iter().map(|(tensor, fault)| json!({"tensor": tensor, "fault": fault})).collect::<Vec<Value>>(),
                "tensors": manifest.tensors,
            }))?;
            return Ok(());
        }
        let rate = plan.source_bytes() as f64 / time.as_secs_f64().max(1e-9);
        let totals = &manifest.totals;
        let mut text = format!("{}\n", outcome_table(manifest, plan));
        text += &format!(
            "{} {}{} -> {}: {} -> {} ({:.2} bits per weight, {:.2} in quantized tensors) in {}, {}/s\n",
            style("Quantized").green().bold(),
            self.model.display(),
            of_ranks(ranks),
            self.output.display(),
            size::bytes(plan.source_bytes()),
            size::bytes(plan.stored_bytes()),
            totals.bits_per_weight,
            totals.quantized_bits_per_weight,
            size::seconds(time),
            size::bytes(rate as u64),
        );
        if self.evidence.runs_the_model() || !chosen.device.is_cpu() {
            text += &device::line(chosen);
        }
        if self.evidence.diagonals_only() {
            text += "Statistics of diagonals only: searches are weighted, errors are not fed back\n";
        }
        for (tensor, fault) in faulty.iter().take(SHOWN) {
            text += &format!("{} {tensor}: {fault}\n", style("warning:").yellow().bold());
        }
        if faulty.len() > SHOWN {
            text += &format!(
                "... and {} more warnings, all in qtool.json\n",
                faulty.len() - SHOWN
            );
        }
        text += &format!(
            "Next: qtool verify {} --base {}\n",
            self.output.display(),
            self.model.display()
        );
        print(&text)
    }
}
