use std::fs::File;

use std::path::PathBuf;

use ::safetensors::tensor::TensorView;
use tch::Device;

use super::*;

const WIDTHS: [Option<i64>; 2] = [Some(4), Some(6)];

/// A file of float32 tensors that count from `first`.
fn file(tensors: &[(&str, &[usize], f32)]) -> (tempfile::TempDir, PathBuf) {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, first)| {
            (0..shape.iter().product()).flat_map(|n: usize| (first + n as f32).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, shape, _), data)| (name.to_string(), TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap()));
    written(&::safetensors::serialize(views, None).unwrap())
}

fn written(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.safetensors");
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn sizes(tensors: &[(&str, &[usize], f32)]) -> Result<[Option<Vec<i64>>; 2]> {
    let (_folder, path) = file(tensors);
    load(&File::open(&path).unwrap(), "<t>", "textual_inversions[0].path", WIDTHS)
        .map(|one| one.vectors.map(|v| v.map(|v| v.size())))
}

#[test]
fn each_format_finds_its_encoder() {
    for (tensors, expected) in [
        (&[("clip_l", &[2, 4][..], 0.0), ("clip_g", &[2, 6], 0.0)][..], [Some(vec![2, 4]), Some(vec![2, 6])]),
        (&[("emb_params", &[3, 4], 0.0)], [Some(vec![3, 4]), None]),
        (&[("emb_params", &[6], 0.0)], [None, Some(vec![1, 6])]),
        (&[("<my-token>", &[1, 4], 0.0)], [Some(vec![1, 4]), None]),
        (&[("0", &[6], 0.0), ("1", &[4], 0.0)], [Some(vec![1, 4]), Some(vec![1, 6])]),
    ] {
        assert_eq!(sizes(tensors).unwrap(), expected, "{tensors:?}");
    }
    let (_folder, path) = file(&[("clip_l", &[1, 4], 0.0), ("clip_g", &[1, 6], 7.0)]);
    let one = load(&File::open(&path).unwrap(), "<t>", "", [None, Some(6)]).unwrap(); // a refiner has the second encoder alone
    assert!(one.vectors[0].is_none());
    assert_eq!(
        Vec::<f32>::try_from(one.vectors[1].as_ref().unwrap().get(0)).unwrap(),
        [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]
    );
}

#[test]
fn what_is_none_is_refused() {
    for tensors in [
        &[("clip_l", &[1, 5][..], 0.0)][..],
        &[("clip_l", &[1, 6], 0.0)],
        &[("emb_params", &[1, 5], 0.0)],
        &[("clip_l", &[1, 4], f32::NAN)],
        &[("clip_l", &[1, 4], f32::INFINITY)],
        &[("clip_l", &[76, 4], 0.0)],
        &[("clip_l", &[0, 4], 0.0)],
        &[("clip_l", &[1, 1, 4], 0.0)],
        &[("a", &[4], 0.0), ("b", &[4], 0.0)],
        &[],
    ] {
        let error = sizes(tensors).unwrap_err();
        assert_eq!(
            (error.code, error.field.as_deref()),
            ("textual_inversion_invalid", Some("textual_inversions[0].path"))
        );
        assert!(error.remedy.is_some(), "{tensors:?}");
    }
    for bytes in [&b"PK\x03\x04rest"[..], b"\x80\x02}q", b"", b"text of no format at all"] {
        let (_folder, path) = written(bytes);
        let error = load(&File::open(&path).unwrap(), "<t>", "f", WIDTHS).err().unwrap();
        assert_eq!(error.code, "textual_inversion_invalid");
        assert_eq!(
            error.remedy.unwrap().starts_with("convert"),
            bytes.starts_with(b"PK") || bytes.starts_with(b"\x80")
        );
    }
    let both = [Some(4), Some(4)];
    let (_folder, path) = file(&[("emb_params", &[4], 0.0)]);
    assert_eq!(load(&File::open(&path).unwrap(), "<t>", "f", both).err().unwrap().code, "textual_inversion_invalid");
}

#[test]
fn a_file_that_is_too_large_is_not_read() {
    let (_folder, path) = written(b"");
    std::fs::File::options().write(true).open(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
    assert_eq!(load(&File::open(&path).unwrap(), "<t>", "f", WIDTHS).err().unwrap().code, "too_large");
}

#[test]
fn borrowed_rows_are_given_back_to_the_bit() {
    let _no_grad = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let table = Tensor::randn([9, 4], (Kind::Float, Device::Cpu)).to_kind(kind);
        let before = table.copy();
        let vectors = Tensor::ones([2, 4], (kind, Device::Cpu));
        {
            let _borrowed = BorrowedRows::new(&table, &[7, 2], &vectors).unwrap();
            assert!(table.index_select(0, &Tensor::from_slice(&[2i64, 7])).equal(&vectors));
            assert!(table.narrow(0, 3, 4).equal(&before.narrow(0, 3, 4)));
        }
        assert!(table.equal(&before));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _borrowed = BorrowedRows::new(&table, &[0], &vectors.narrow(0, 0, 1)).unwrap();
            let _ = &vectors + Tensor::ones([3, 5], (kind, Device::Cpu)); // no such sum
        }));
        assert!(panicked.is_err() && table.equal(&before));
        assert!(BorrowedRows::new(&table, &[1], &Tensor::ones([1, 5], (kind, Device::Cpu))).is_err());
        assert!(table.equal(&before));
    }
}
