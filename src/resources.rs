//! What the machine did while a validation ran: a thread that looks every half second. Owns the sampling; the report
//! holds the samples.
//!
//! Processor and memory are of this process, as Linux tells them in `/proc/self`; elsewhere there are no samples. Load
//! and memory of accelerators come from NVIDIA's management library when a driver is installed, which is found at run
//! time; they are of the whole machine: the busiest device's load, and all devices' memory.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;

use crate::report::ResourceSample;

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(500);
/// Samples kept at most: when there are as many, neighbours are merged and looks become half as frequent.
const MOST: usize = 512;
/// Ticks of processor time a second in `/proc`: `USER_HZ`, 100 on every Linux that Rust builds for.
const TICKS: f64 = 100.0;

/// A running sampler. Dropping it stops it too.
#[derive(Debug)]
pub struct Sampler {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<Vec<ResourceSample>>>,
}

impl Sampler {
    /// Starts looking. Where no thread can be started there will be no samples, which fails nothing.
    pub fn start() -> Self {
        Self::every(EVERY)
    }

    fn every(every: Duration) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name("resources".to_owned());
        let thread = thread.spawn(move || watch(every, &stopped)).ok();
        Self {
            stop: Some(stop),
            thread,
        }
    }

    /// Stops looking and gives what was seen, in order of time; the last sample is of the moment of stopping.
    pub fn stop(mut self) -> Vec<ResourceSample> {
        drop(self.stop.take());
        self.thread
            .take()
            .and_then(|thread| thread.join().ok())
            .unwrap_or_default()
    }
}

fn watch(every: Duration, stopped: &Receiver<()>) -> Vec<ResourceSample> {
    let accelerators = Nvml::init().ok();
    let start = Instant::now();
    let mut trace = Trace {
        every,
        samples: Vec::new(),
    };
    let Some(mut before) = processor_seconds() else {
        return trace.samples;
    };
    let mut looked = start;
    loop {
        let going = matches!(stopped.recv_timeout(trace.every), Err(RecvTimeoutError::Timeout));
        let now = Instant::now();
        if let (Some(used), Some(memory_bytes)) = (processor_seconds(), resident_bytes()) {
            let passed = now.duration_since(looked).as_secs_f64();
            let (gpu_percent, gpu_memory_bytes) = accelerators.as_ref().map_or((None, None), accelerator);
            // A tick is 10 ms: over a shorter time the share would be noise.
            if going || passed > 0.1 || trace.samples.is_empty() {
                trace.add(ResourceSample {
                    at: now.duration_since(start).as_secs_f64(),
                    cpu_percent: (used - before) / passed.max(0.01) * 100.0,
                    memory_bytes,
                    gpu_percent,
                    gpu_memory_bytes,
                });
                (before, looked) = (used, now);
            }
        }
        if !going {
            return trace.samples;
        }
    }
}

/// Samples, bounded.
struct Trace {
    every: Duration,
    samples: Vec<ResourceSample>,
}

impl Trace {
    fn add(&mut self, sample: ResourceSample) {
        self.samples.push(sample);
        if self.samples.len() >= MOST {
            self.samples = self.samples.chunks(2).map(merged).collect();
            self.every *= 2;
        }
    }
}

/// One sample for some: the time of the last, means of loads, the most of memory, so that no peak is lost.
fn merged(some: &[ResourceSample]) -> ResourceSample {
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    let loads: Vec<f64> = some.iter().filter_map(|s| s.gpu_percent).collect();
    ResourceSample {
        at: some.last().map_or(0.0, |s| s.at),
        cpu_percent: mean(some.iter().map(|s| s.cpu_percent).collect()),
        memory_bytes: some.iter().map(|s| s.memory_bytes).max().unwrap_or(0),
        gpu_percent: (!loads.is_empty()).then(|| mean(loads)),
        gpu_memory_bytes: some.iter().filter_map(|s| s.gpu_memory_bytes).max(),
    }
}

/// Processor time of all threads of this process so far.
fn processor_seconds() -> Option<f64> {
    processor_ticks(&std::fs::read_to_string("/proc/self/stat").ok()?).map(|ticks| ticks / TICKS)
}

/// User and system time from the text of `/proc/self/stat`: fields 14 and 15; the second field, the program's name in
/// brackets, may itself hold blanks and brackets.
fn processor_ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn accelerator(nvml: &Nvml) -> (Option<f64>, Option<u64>) {
    let devices = (0..nvml.device_count().unwrap_or(0)).filter_map(|i| nvml.device_by_index(i).ok());
    let (mut load, mut memory) = (None::<f64>, None::<u64>);
    for device in devices {
        if let Ok(rates) = device.utilization_rates() {
            load = Some(load.unwrap_or(0.0).max(f64::from(rates.gpu)));
        }
        if let Ok(info) = device.memory_info() {
            memory = Some(memory.unwrap_or(0) + info.used);
        }
    }
    (load, memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_stat() {
        let stat = "42 (a b) c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 1000 10";
        assert_eq!(processor_ticks(stat), Some(300.0));
        assert_eq!(processor_ticks("nonsense"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_busy_thread_is_seen() {
        let sampler = Sampler::every(Duration::from_millis(50));
        let (start, mut x) = (Instant::now(), 1_u64);
        while start.elapsed() < Duration::from_millis(400) {
            x = std::hint::black_box(x.wrapping_mul(6_364_136_223_846_793_005));
        }
        let seen = sampler.stop();
        assert!(seen.len() >= 2, "{seen:?}");
        assert!(seen.windows(2).all(|w| w[0].at < w[1].at), "{seen:?}");
        assert!(
            seen.iter().any(|s| s.cpu_percent > 0.0) && seen.iter().all(|s| s.memory_bytes > 1 << 20),
            "{seen:?}"
        );
    }

    #[test]
    fn a_long_trace_is_thinned_and_keeps_its_peak() {
        let mut trace = Trace {
            every: EVERY,
            samples: Vec::new(),
        };
        for i in 0..5000_u32 {
            trace.add(ResourceSample {
                at: f64::from(i),
                cpu_percent: 50.0,
                memory_bytes: if i == 777 { 9999 } else { 10 },
                gpu_percent: None,
                gpu_memory_bytes: None,
            });
        }
        assert!(trace.samples.len() < MOST && trace.every > EVERY * 4);
        assert_eq!(trace.samples.iter().map(|s| s.memory_bytes).max(), Some(9999));
        assert!(
            trace
                .samples
                .iter()
                .all(|s| (s.cpu_percent - 50.0).abs() < 1e-9 && s.gpu_percent.is_none())
        );
    }
}
