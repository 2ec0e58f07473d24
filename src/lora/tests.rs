//! Weights on the way into a set of LoRAs and back, byte by byte. That the numbers are diffusers' is tested in
//! `tests/parity/test_lora.py`.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use tch::IndexOp;

use super::change::{Delta, Factor};
use super::*;
use crate::torch::Generator;
use crate::weights::Checkpoint;

const QUERY: &str = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight";
const KERNEL: &str = "down_blocks.0.resnets.0.conv1.weight";
const NORM: &str = "conv_norm_out.weight";

/// Writes float32 tensors as `kind`. `shift` moves the data by so many bytes, off every alignment.
fn write(path: &Path, tensors: &[(&str, Tensor)], kind: Kind, shift: usize) {
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, tensor) in tensors {
        let stored = bytes(&tensor.to_kind(kind));
        let dtype = if kind == Kind::Float { "F32" } else { "BF16" };
        let offsets = [data.len(), data.len() + stored.len()];
        let entry = serde_json::json!({ "dtype": dtype, "shape": tensor.size(), "data_offsets": offsets });
        header.insert((*name).to_owned(), entry);
        data.extend(stored);
    }
    let mut text = serde_json::to_string(&header).unwrap();
    text.push_str(&" ".repeat((8 - text.len() % 8) % 8 + shift));
    fs::write(path, [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()).unwrap();
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.contiguous().view(-1).view_dtype(Kind::Uint8);
    Vec::try_from(&flat).unwrap()
}

fn random(seed: i64, size: &[i64]) -> Tensor {
    Generator::new(seed as u64).unwrap().randn(size, Kind::Float).unwrap() // of its own: tests run side by side
}

struct Setup {
    folder: tempfile::TempDir,
    loras: Loras,
    base: Vec<(&'static str, Vec<u8>)>,
}

impl Setup {
    fn new(stored: Kind, computed: Kind, shift: usize, backup: Backup, memory: u64) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("diffusion_pytorch_model.safetensors");
        // more than a page each, so that pages are shared with neighbours and also not
        let tensors = [(NORM, random(1, &[300])), (QUERY, random(2, &[64, 48])), (KERNEL, random(3, &[24, 12, 3, 3]))];
        write(&file, &tensors, stored, shift);
        let checkpoint = Checkpoint::open("unet", folder.path(), &[None]).unwrap();
        let weights = Weights::new(checkpoint, Device::Cpu, computed).bind_all();
        let names = [NORM, QUERY, KERNEL];
        let base = names.map(|name| (name, bytes(&weights.parameter(name).unwrap()))).to_vec();
        let loras = Loras::new(vec![("unet", weights)], Settings { backup, memory });
        Setup { folder, loras, base }
    }

    fn usual() -> Setup {
        Setup::new(Kind::Float, Kind::Float, 0, Backup::File, 1 << 20)
    }

    /// A LoRA of rank 4 and alpha 2 for the matrix, of rank 4 for the kernel.
    fn lora(&self, seed: i64, scale: f64) -> Wanted {
        let path = self.folder.path().join(format!("{seed}.lora"));
        let (query, kernel) = (QUERY.trim_end_matches(".weight"), KERNEL.trim_end_matches(".weight"));
        let kernel = format!("lora_unet_{}", kernel.replace('.', "_"));
        let tensors = [
            (format!("unet.{query}.lora_A.weight"), random(seed, &[4, 48])),
            (format!("unet.{query}.lora_B.weight"), random(seed + 1, &[64, 4])),
            (format!("unet.{query}.alpha"), Tensor::from(2f32)),
            (format!("{kernel}.lora_down.weight"), random(seed + 2, &[4, 12, 3, 3])),
            (format!("{kernel}.lora_up.weight"), random(seed + 3, &[24, 4, 1, 1])),
            ("nothing.lora_up.weight".to_owned(), random(seed, &[1])),
        ];
        let tensors: Vec<(&str, Tensor)> = tensors.iter().map(|(name, t)| (name.as_str(), t.shallow_clone())).collect();
        write(&path, &tensors, Kind::Float, 0);
        self.wanted(&path, scale)
    }

    fn wanted(&self, path: &Path, scale: f64) -> Wanted {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let file = Arc::new(File::open(path).unwrap());
        Wanted { sha256: name.clone(), field: "loras[0].name".into(), name, scale, file }
    }

    fn apply(&mut self, wanted: &[Wanted]) -> Result<(Vec<LoraReport>, Spent)> {
        self.loras.apply(wanted, &JobContext::default())
    }

    fn weight(&self, name: &str) -> Tensor {
        self.loras.components[0].parameter(name).unwrap()
    }

    /// Whether the weights have left: every number of them is the same one.
    fn is_away(&self) -> bool {
        !self.loras.components[0].is_here() && self.weight(QUERY).stride() == [0, 0]
    }

    /// With the weights on the device for this call.
    fn contents_in_use(&mut self) -> Vec<(&'static str, Vec<u8>)> {
        self.loras.enter(0, &JobContext::default()).unwrap();
        let contents = self.contents();
        self.loras.exit(0);
        contents
    }

    fn contents(&self) -> Vec<(&'static str, Vec<u8>)> {
        self.base.iter().map(|(name, _)| (*name, bytes(&self.weight(name)))).collect()
    }
}

#[test]
fn the_base_comes_back_byte_by_byte_wherever_it_comes_from() {
    for (stored, computed, shift) in [
        (Kind::Float, Kind::Float, 0), // the file's own pages
        (Kind::Float, Kind::Float, 1), // a copy, since nothing is aligned
        (Kind::BFloat16, Kind::BFloat16, 0),
        (Kind::BFloat16, Kind::Float, 0), // another dtype
        (Kind::Float, Kind::BFloat16, 0),
    ] {
        for backup in [Backup::File, Backup::Copy] {
            let mut setup = Setup::new(stored, computed, shift, backup, 1 << 20);
            let what = format!("{stored:?} as {computed:?}, shifted by {shift}, {backup:?}");
            let (first, second) = (setup.lora(10, 0.5), setup.lora(20, -1.5));
            setup.apply(std::slice::from_ref(&first)).unwrap();
            let changed = setup.contents();
            let differs: Vec<bool> = changed.iter().zip(&setup.base).map(|(a, b)| a != b).collect();
            assert_eq!(differs, [false, true, true], "{what}");
            setup.apply(&[first.clone(), second]).unwrap();
            setup.apply(&[first]).unwrap();
            assert!(setup.contents() == changed, "{what}: not the same the second time");
            setup.apply(&[]).unwrap();
            assert!(setup.contents() == setup.base, "{what}: not the base");
        }
    }
}

#[test]
fn the_sum_is_rounded_once() {
    let mut setup = Setup::new(Kind::Float, Kind::BFloat16, 0, Backup::File, 1 << 20);
    let base = setup.weight(QUERY).to_kind(Kind::Float);
    let scales = [0.5, -0.25, 1.0];
    let wanted: Vec<Wanted> = (0..3).map(|n| setup.lora(10 * (n + 1), scales[n as usize])).collect();
    let delta = |seed: i64| random(seed + 1, &[64, 4]).matmul(&random(seed, &[4, 48])) * 0.5; // alpha 2, rank 4
    let expected = base + delta(10) * scales[0] + delta(20) * scales[1] + delta(30) * scales[2];
    setup.apply(&wanted).unwrap();
    let off = (setup.weight(QUERY).to_kind(Kind::Float) - &expected).abs();
    // half a unit in the last place of bfloat16, and a little for the order of float32 sums
    let bound = expected.abs() * 2f64.powi(-8) * 1.001 + 1e-5;
    assert!(off.le_tensor(&bound).all().int64_value(&[]) == 1);
}

#[test]
fn what_float16_cannot_hold_is_refused_and_leaves_the_base() {
    for (kind, fits) in [(Kind::Half, false), (Kind::BFloat16, true)] {
        let mut setup = Setup::new(Kind::Float, kind, 0, Backup::File, 1 << 20);
        let path = setup.folder.path().join("large.safetensors");
        let query = QUERY.trim_end_matches(".weight");
        let (a, b) = (format!("unet.{query}.lora_A.weight"), format!("unet.{query}.lora_B.weight"));
        let large = |size: [i64; 2]| Tensor::full(size, 100.0, (Kind::Float, Device::Cpu));
        write(&path, &[(&a, large([4, 48])), (&b, large([64, 4]))], Kind::Float, 0);
        let result = setup.apply(&[setup.wanted(&path, 3.0)]);
        assert_eq!(result.map(|_| ()).map_err(|error| error.code), if fits { Ok(()) } else { Err("lora_overflow") });
        assert_eq!(setup.contents() == setup.base, !fits);
    }
}

#[test]
fn what_was_in_the_weights_before_leaves_no_trace() {
    let mut setup = Setup::usual();
    let files = [setup.lora(10, 1.0), setup.lora(20, 1.0), setup.lora(30, 1.0)];
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..100 {
        let mut set: Vec<Wanted> = files.iter().filter(|_| random.bool()).cloned().collect();
        set.iter_mut().for_each(|lora| lora.scale = [-1.0, 0.0, 0.7][random.usize(0..3)]);
        random.shuffle(&mut set);
        setup.apply(&set).unwrap();
        let mut fresh = Setup::usual();
        fresh.apply(&set).unwrap();
        assert!(setup.contents() == fresh.contents());
    }
    setup.apply(&[]).unwrap();
    assert!(setup.contents() == setup.base);
}

#[test]
fn sums_do_not_depend_on_the_order_in_which_loras_are_named() {
    let mut setup = Setup::usual();
    let set = [setup.lora(10, 0.3), setup.lora(20, 0.7), setup.lora(30, -0.2)];
    setup.apply(&set).unwrap();
    let first = setup.contents();
    let turned: Vec<Wanted> = set.iter().rev().cloned().collect();
    setup.apply(&turned).unwrap();
    assert!(setup.contents() == first);
}

#[test]
fn the_same_set_costs_nothing_and_has_the_same_name() {
    let mut setup = Setup::usual();
    assert_eq!(setup.loras.weights_id(), "");
    let set = [setup.lora(10, 0.5), setup.lora(20, 0.0)];
    let (reports, spent) = setup.apply(&set).unwrap();
    assert!(!spent.fuse.is_zero());
    assert_eq!((reports[0].matched, reports[0].unmatched_count), (5, 1));
    assert_eq!(reports[0].unmatched, ["nothing.lora_up.weight"]);
    assert_eq!(setup.loras.weights_id(), "10@0.5", "a scale of 0 is as if it were absent");
    let renamed = set.map(|lora| Wanted { name: "other".into(), ..lora });
    let (reports, spent) = setup.apply(&renamed).unwrap();
    assert!(spent.load.is_zero() && spent.restore.is_zero() && spent.fuse.is_zero());
    assert_eq!(reports[0].name, "other");
    setup.apply(&[]).unwrap();
    assert_eq!(setup.loras.weights_id(), "");
}

#[test]
fn a_panic_in_the_middle_leaves_the_base() {
    let mut setup = Setup::usual();
    let good = setup.lora(10, 1.0);
    setup.apply(std::slice::from_ref(&good)).unwrap();
    let changed = setup.contents();
    // torch refuses the second product, after the first weight was written
    assert!(KERNEL < QUERY, "weights are changed by name");
    let change = |name: &str, rows, columns| {
        let product = Factor::Product(random(1, &[rows, 2]), random(2, &[2, columns]));
        let target = Target { component: 0, parameter: name.to_owned() };
        (target, Change { delta: Delta::LowRank(product), scaling: 1.0, dora: None })
    };
    let changes = BTreeMap::from([change(KERNEL, 24, 108), change(QUERY, 64, 5)]);
    let broken = LoraFile { changes, matched: 4, unmatched: Vec::new(), bytes: 0 };
    setup.loras.store.get("broken", || Ok(broken)).unwrap();
    let bad = Wanted { sha256: "broken".into(), ..good.clone() };
    let outcome = catch_unwind(AssertUnwindSafe(|| setup.apply(&[bad]).map(|_| ())));
    assert!(outcome.is_err());
    assert!(setup.contents() == setup.base);
    assert_eq!(setup.loras.weights_id(), "");
    setup.apply(&[good]).unwrap();
    assert!(setup.contents() == changed);
}

#[test]
fn a_cancelled_change_leaves_the_base() {
    let mut setup = Setup::usual();
    let lora = setup.lora(10, 1.0);
    let context = JobContext::default();
    context.cancel();
    assert_eq!(setup.loras.apply(&[lora], &context).unwrap_err().code, "cancelled");
    assert!(setup.contents() == setup.base);
}

#[test]
fn a_file_that_does_not_fit_changes_nothing() {
    let mut setup = Setup::usual();
    let good = setup.lora(10, 1.0);
    setup.apply(std::slice::from_ref(&good)).unwrap();
    let changed = setup.contents();
    let module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q";
    let matrix = |rows: i64, columns: i64| random(5, &[rows, columns]);
    let not_finite = matrix(64, 4);
    let _ = not_finite.i((0, 0)).fill_(f64::NAN);
    let parts = |down: Tensor, up: Tensor| vec![("lora_down.weight", down), ("lora_up.weight", up)];
    let whole_and = |part: &'static str, tensor: Tensor| {
        let whole = parts(matrix(4, 48), matrix(64, 4));
        whole.into_iter().chain([(part, tensor)]).collect::<Vec<_>>()
    };
    for (what, parts, code) in [
        ("wide", parts(matrix(4, 50), matrix(64, 4)), "lora_mismatch"),
        ("high", parts(matrix(4, 48), matrix(60, 4)), "lora_mismatch"),
        ("ranks", parts(matrix(4, 48), matrix(64, 5)), "lora_damaged"),
        ("half", vec![("lora_up.weight", matrix(64, 4))], "lora_damaged"),
        ("nan", parts(matrix(4, 48), not_finite), "lora_damaged"),
        ("alpha", whole_and("alpha", matrix(2, 2)), "lora_damaged"),
        ("two", whole_and("hada_w1_a", matrix(64, 4)), "lora_damaged"),
        ("only alpha", vec![("alpha", Tensor::from(1f32))], "lora_mismatch"),
        ("dora", whole_and("dora_scale", matrix(7, 1)), "lora_mismatch"),
        ("other", vec![("oft_blocks", matrix(4, 4))], "lora_unsupported"),
    ] {
        let keys: Vec<(String, Tensor)> = parts.into_iter().map(|(part, t)| (format!("{module}.{part}"), t)).collect();
        let keys: Vec<(&str, Tensor)> = keys.iter().map(|(key, t)| (key.as_str(), t.shallow_clone())).collect();
        let path = setup.folder.path().join(what);
        write(&path, &keys, Kind::Float, 0);
        let bad = setup.wanted(&path, 1.0);
        let error = setup.apply(&[good.clone(), bad]).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (code, Some("loras[0].name")), "{what}: {error}");
        assert!(error.remedy.is_some() && setup.contents() == changed, "{what}");
    }
}

#[test]
fn a_file_that_is_cut_or_changed_while_it_is_used_does_no_harm() {
    let mut setup = Setup::usual();
    let lora = setup.lora(10, 1.0);
    let path = setup.folder.path().join("10.lora");
    setup.apply(std::slice::from_ref(&lora)).unwrap();
    let changed = setup.contents();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    setup.apply(&[]).unwrap();
    setup.apply(std::slice::from_ref(&lora)).unwrap();
    assert!(setup.contents() == changed, "what was read stays as it was read");
    let again = Wanted { sha256: "not yet read".into(), ..lora };
    assert_eq!(setup.apply(&[again]).unwrap_err().code, "lora_damaged");
}

#[test]
fn files_that_memory_has_no_room_for_are_read_again() {
    let mut setup = Setup::new(Kind::Float, Kind::Float, 0, Backup::File, 1);
    let set = [setup.lora(10, 1.0), setup.lora(20, 1.0)];
    for _ in 0..3 {
        setup.apply(&set).unwrap();
        setup.apply(&set[..1]).unwrap();
    }
    setup.apply(&[]).unwrap();
    assert!(setup.contents() == setup.base);
}

#[test]
fn weights_that_leave_are_the_base_and_come_back_with_their_loras() {
    for (stored, computed, shift) in [
        (Kind::Float, Kind::Float, 0), // the file's own pages
        (Kind::Float, Kind::Float, 1), // a copy, since nothing is aligned
        (Kind::BFloat16, Kind::Float, 0),
    ] {
        for backup in [Backup::File, Backup::Copy] {
            let what = format!("{stored:?} as {computed:?}, shifted by {shift}, {backup:?}");
            let mut setup = Setup::new(stored, computed, shift, backup, 1 << 20);
            let (first, second) = (setup.lora(10, 0.5), setup.lora(20, -1.5));
            let mut expected = Vec::new();
            for wanted in [std::slice::from_ref(&first), std::slice::from_ref(&second), &[]] {
                setup.apply(wanted).unwrap();
                expected.push(setup.contents());
            }

            // away with a LoRA in them, and back
            setup.apply(std::slice::from_ref(&first)).unwrap();
            let id = setup.loras.weights_id();
            setup.loras.set_offload(&["unet"], true);
            assert!(setup.is_away(), "{what}");
            assert!(setup.contents_in_use() == expected[0], "{what}: not what was fused before");
            assert!(setup.is_away() && setup.loras.weights_id() == id, "{what}");

            // other LoRAs, and none, while they are away
            for (wanted, expected) in
                [(vec![second.clone()], &expected[1]), (vec![], &expected[2]), (vec![first], &expected[0])]
            {
                let spent = setup.apply(&wanted).unwrap().1;
                assert!(setup.is_away() && spent.fuse < std::time::Duration::from_secs(1), "{what}");
                assert!(setup.contents_in_use() == *expected, "{what}");
                assert!(setup.contents_in_use() == *expected, "{what}: not the same the second time");
            }

            // what is in use stays until its end
            let loras = RefCell::new(setup.loras);
            let in_use = super::in_use(&loras, &["unet"], &JobContext::default()).unwrap();
            loras.borrow_mut().set_offload(&["unet"], true);
            assert!(loras.borrow().components[0].is_here(), "{what}");
            drop(in_use);
            assert!(!loras.borrow().components[0].is_here(), "{what}");
        }
    }
}

#[test]
fn weights_whose_loras_cannot_be_fused_again_stay_away() {
    let mut setup = Setup::usual();
    setup.apply(&[]).unwrap();
    let base = setup.contents();
    setup.loras.set_offload(&["unet"], true);
    let lora = setup.lora(10, 0.5);
    setup.apply(std::slice::from_ref(&lora)).unwrap();
    let context = JobContext::default();
    context.cancel();
    let loras = RefCell::new(setup.loras);
    assert_eq!(super::in_use(&loras, &["unet"], &context).err().unwrap().code, "cancelled");
    assert!(!loras.borrow().components[0].is_here());
    setup.loras = loras.into_inner();
    setup.apply(&[]).unwrap();
    assert!(setup.contents_in_use() == base);
}

#[test]
fn when_one_component_cannot_come_back_nobody_uses_the_others() {
    let mut setup = Setup::usual();
    let other = Checkpoint::open("unet", setup.folder.path(), &[None]).unwrap();
    setup.loras.names.insert(0, "text_encoder");
    setup.loras.components.insert(0, Weights::new(other, Device::Cpu, Kind::BFloat16).bind_all());
    let components = ["text_encoder", "unet"];
    setup.loras.set_offload(&components, true);
    let lora = setup.lora(10, 0.5);
    setup.apply(&[lora]).unwrap();
    let cancelled = JobContext::default();
    cancelled.cancel();
    let loras = RefCell::new(setup.loras);
    let here = || loras.borrow().components.iter().map(Weights::is_here).collect::<Vec<_>>();
    assert!(super::in_use(&loras, &components, &cancelled).is_err());
    assert_eq!(here(), [false, false]);
    let both = super::in_use(&loras, &components, &JobContext::default()).unwrap();
    assert_eq!((here(), both.uploaded), (vec![true, true], true));
    drop(both);
    assert_eq!(here(), [false, false]);
}
