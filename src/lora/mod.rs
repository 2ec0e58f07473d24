//! LoRA for one request: files fused into the bound weights, and the base brought back bit by bit afterwards.
//!
//! A step costs what it costs without: the graphs compute with changed weights. All checks stand before the first write;
//! whatever fails later, a panic included, leaves the base.

mod build;
mod change;
mod file;
mod home;
mod keys;
mod names;
mod store;

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::api::LoraReport;
use crate::context::JobContext;
use crate::error::{Error, ErrorClass, Result};
use crate::memory::{available, format_bytes};
use crate::weights::Weights;
use change::{Change, fuse};
use file::{LoraFile, Model};
pub(crate) use home::in_use;
use names::{NameTable, Target};
use store::Store;

/// Where the base comes from when a LoRA is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backup {
    /// The checkpoint's file, which costs no memory.
    File,
    /// A copy in memory, for weights on a disk too slow to read again.
    Copy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub backup: Backup,
    /// Most bytes of LoRA files that are kept in memory.
    pub memory: u64,
}

/// A LoRA that a request asks for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// What the reply calls it.
    pub name: String,
    /// Path into the request, such as `loras[0].name`.
    pub field: String,
    pub scale: f64,
    pub sha256: String,
    pub file: Arc<File>,
}

impl Wanted {
    /// The file and its scale, bit by bit: equal lists of these make equal weights.
    pub fn key(&self) -> (String, u64) {
        (self.sha256.clone(), self.scale.to_bits())
    }
}

/// Time that a change of LoRAs took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    pub load: Duration,
    pub restore: Duration,
    pub fuse: Duration,
}

/// The weights that LoRAs change, and the LoRAs that are in them now.
pub struct Loras {
    names: Vec<&'static str>,
    components: Vec<Weights>,
    table: Option<NameTable>,
    store: Store,
    backup: Backup,
    applied: Applied,
}

/// What has been written, or may have been.
#[derive(Default)]
struct Applied {
    /// What was asked for, in order; empty while a change is under way.
    key: Vec<(String, u64)>,
    reports: Vec<LoraReport>,
    /// The same with its files, for weights that come back to the device.
    wanted: Vec<Wanted>,
    /// Every parameter that was written to, with its copy where one is kept.
    changed: BTreeMap<Target, Option<Tensor>>,
}

impl Loras {
    /// `components`: `unet`, `text_encoder`, `text_encoder_2`, as far as the model has them.
    pub fn new(components: Vec<(&'static str, Weights)>, settings: Settings) -> Self {
        let (names, components) = components.into_iter().unzip();
        Loras {
            names,
            components,
            table: None,
            store: Store::new(settings.memory),
            backup: settings.backup,
            applied: Applied::default(),
        }
    }

    /// Names what is in the weights: equal for equal weights of one model. Empty for the base.
    pub fn weights_id(&self) -> String {
        let acts = self.applied.key.iter().filter(|(_, scale)| f64::from_bits(*scale) != 0.0);
        acts.map(|(sha256, scale)| format!("{sha256}@{}", f64::from_bits(*scale))).collect::<Vec<_>>().join(",")
    }

    /// Sees to it that exactly these are in the weights. For what is in them already nothing is done.
    ///
    /// # Errors
    /// `lora_damaged`, `lora_unsupported`, `lora_mismatch`, `lora_overflow`, `memory_limit`, `cancelled`; after each of them
    /// the weights are what they were before the call, or the base.
    pub fn apply(&mut self, wanted: &[Wanted], context: &JobContext) -> Result<(Vec<LoraReport>, Spent)> {
        let key: Vec<_> = wanted.iter().map(Wanted::key).collect();
        let mut spent = Spent::default();
        // without a key, changes are those of an attempt that could not be taken back
        if key == self.applied.key && (!key.is_empty() || self.applied.changed.is_empty()) {
            return Ok((named(&self.applied.reports, wanted), spent));
        }
        let started = Instant::now();
        let files = self.load(wanted)?;
        let reports: Vec<LoraReport> = wanted.iter().zip(&files).map(|(lora, file)| report(lora, file)).collect();
        let mut plan = plan(wanted, &files);
        // the others get theirs when they come back to the device
        plan.retain(|target, _| self.components[target.component].is_here());
        self.check_memory(&plan)?;
        spent.load = started.elapsed();

        let started = Instant::now();
        self.restore()?;
        spent.restore = started.elapsed();

        let started = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| self.fuse(&plan, context)));
        if !matches!(result, Ok(Ok(()))) {
            self.restore()?;
        }
        result.unwrap_or_else(|panic| resume_unwind(panic))?;
        spent.fuse = started.elapsed();
        self.applied.key = key;
        self.applied.reports = reports.clone();
        self.applied.wanted = wanted.to_vec();
        Ok((reports, spent))
    }

    /// Makes every weight the base again.
    pub fn restore(&mut self) -> Result<()> {
        self.applied.key.clear();
        self.applied.reports.clear();
        self.applied.wanted.clear();
        for (index, weights) in self.components.iter().enumerate() {
            let own = || self.applied.changed.iter().filter(move |(target, _)| target.component == index);
            for (target, copy) in own() {
                if let (Some(copy), Some(mut weight)) = (copy, weights.parameter(&target.parameter)) {
                    weight.f_copy_(copy).map_err(anyhow::Error::from)?;
                }
            }
            let from_file = own().filter(|(_, copy)| copy.is_none()).map(|(target, _)| target.parameter.as_str());
            weights.restore(from_file)?;
        }
        self.applied.changed.clear();
        Ok(())
    }

    fn load(&mut self, wanted: &[Wanted]) -> Result<Vec<Rc<LoraFile>>> {
        let table = self.table.get_or_insert_with(|| table(&self.names, &self.components));
        let components = &self.components;
        let shape = |target: &Target| {
            components[target.component].parameter(&target.parameter).expect("the table is made of these").size()
        };
        let model = Model { table, components: &self.names, shape: &shape };
        let store = &mut self.store;
        let files = wanted.iter().map(|lora| {
            store
                .get(&lora.sha256, || LoraFile::read(&lora.file, &model))
                .map_err(|e| Error { message: format!("{}: {}", lora.name, e.message), ..e }.field(lora.field.clone()))
        });
        let files = files.collect();
        store.trim();
        files
    }

    /// Pages of the mapped files that will be copied must fit, or the process is killed in the middle of it.
    fn check_memory(&self, plan: &Plan) -> Result<()> {
        let bytes = |target: &Target| {
            let weights = &self.components[target.component];
            let weight = weights.parameter(&target.parameter).expect("the table is made of these");
            let on_host = weight.device() == Device::Cpu;
            let copied = weights.is_mapped(&target.parameter) || self.backup == Backup::Copy && on_host;
            if copied { (weight.numel() * weight.kind().elt_size_in_bytes()) as u64 } else { 0 }
        };
        let needed: u64 = plan.keys().map(bytes).sum();
        let held: u64 = self.applied.changed.keys().map(bytes).sum();
        match available() {
            Some(free) if needed > free + held => {
                let (needed, free) = (format_bytes(needed), format_bytes(free + held));
                let message = format!("the changed weights need about {needed}, free are {free}");
                Err(Error::new(ErrorClass::TooLarge, "memory_limit", message)
                    .field("loras")
                    .remedy("use a LoRA that changes fewer layers, or a machine with more memory"))
            }
            _ => Ok(()),
        }
    }

    fn fuse(&mut self, plan: &Plan, context: &JobContext) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let mut finite = Vec::new();
        for (target, changes) in plan {
            context.check_cancelled()?;
            let weights = &self.components[target.component];
            let mut weight = weights.parameter(&target.parameter).expect("the table is made of these");
            let copy = match self.backup {
                Backup::File => None,
                Backup::Copy => Some(weight.copy()),
            };
            // from here on it counts as changed
            self.applied.changed.insert(target.clone(), copy);
            fuse(&mut weight, changes);
            if weight.kind() == Kind::Half {
                finite.push(weight.isfinite().all());
            }
        }
        // asked once, since a device that is asked has to stop
        if !finite.is_empty() && Tensor::stack(&finite, 0).all().int64_value(&[]) == 0 {
            let message = "with these LoRAs a weight is larger than float16 can hold";
            return Err(Error::invalid("lora_overflow", "loras", message)
                .remedy("use smaller scales, or run the worker with --dtype bfloat16"));
        }
        Ok(())
    }
}

/// For each weight its changes, with the scales that the request gives them.
type Plan<'a> = BTreeMap<Target, Vec<(f64, &'a Change)>>;

fn plan<'a>(wanted: &[Wanted], files: &'a [Rc<LoraFile>]) -> Plan<'a> {
    let mut order: Vec<usize> = (0..wanted.len()).filter(|&index| wanted[index].scale != 0.0).collect();
    // Sums do not depend on the order in which LoRAs are named, not even in their last bit; what DoRA makes of them does.
    if !order.iter().any(|&index| files[index].changes.values().any(|change| change.dora.is_some())) {
        order.sort_by(|&a, &b| {
            let key = |index: usize| (&wanted[index].sha256, wanted[index].scale.to_bits());
            key(a).cmp(&key(b))
        });
    }
    let mut plan = Plan::new();
    for index in order {
        for (target, change) in &files[index].changes {
            plan.entry(target.clone()).or_default().push((wanted[index].scale, change));
        }
    }
    plan
}

/// Of every matrix and kernel that is bound.
fn table(names: &[&'static str], components: &[Weights]) -> NameTable {
    let weights = components.iter().map(|weights| {
        let matrices = weights.parameters().filter(|(_, tensor)| tensor.dim() >= 2 && tensor.kind() != Kind::Int64);
        matrices.map(|(name, _)| name).collect()
    });
    NameTable::new(names.iter().copied().zip(weights))
}

/// Keys that do nothing are listed up to this many.
const MAX_LISTED: usize = 20;

fn report(lora: &Wanted, file: &LoraFile) -> LoraReport {
    LoraReport {
        name: lora.name.clone(),
        scale: lora.scale,
        matched: file.matched,
        unmatched: file.unmatched.iter().take(MAX_LISTED).map(|key| key.chars().take(200).collect()).collect(),
        unmatched_count: file.unmatched.len(),
    }
}

/// The same files under the names that this request gives them.
fn named(reports: &[LoraReport], wanted: &[Wanted]) -> Vec<LoraReport> {
    reports.iter().zip(wanted).map(|(report, lora)| LoraReport { name: lora.name.clone(), ..report.clone() }).collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
