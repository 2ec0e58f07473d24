//! What a LoRA file does to one weight, and the arithmetic of it: float32 on the weight's device. Formulas are those of
//! peft (LoRA, DoRA) and LyCORIS (LoCon, LoHa, LoKr, DoRA with `dora_scale`).

use tch::{Device, Kind, Tensor};

/// The change of one weight at scale 1 is `scaling * delta`, and for DoRA a new length of rows or columns.
pub(super) struct Change {
    pub(super) delta: Delta,
    /// alpha / rank.
    pub(super) scaling: f64,
    pub(super) dora: Option<Dora>,
}

pub(super) enum Delta {
    /// LoRA and LoCon.
    LowRank(Factor),
    /// LoHa: the product entry by entry.
    Hadamard(Factor, Factor),
    /// LoKr: the Kronecker product.
    Kronecker(Factor, Factor),
}

/// A matrix in one piece or in several. Kernels are flattened behind the input channels.
pub(super) enum Factor {
    /// `[rows, columns]`
    Whole(Tensor),
    /// `[rows, rank]` and `[rank, columns]`
    Product(Tensor, Tensor),
    /// Core `[rank_a, rank_b, kernel]`, `[rank_a, rows]` and `[rank_b, columns]`.
    Tucker { core: Tensor, a: Tensor, b: Tensor },
}

pub(super) enum Dora {
    /// `[out]`: the lengths of the rows of the sum.
    Peft(Tensor),
    /// `[out]` or `[in]`: the lengths of rows or of input channels.
    Lycoris { lengths: Tensor, of_rows: bool },
}

impl Factor {
    /// Rows, and columns with the kernel.
    pub(super) fn shape(&self) -> (i64, i64) {
        match self {
            Factor::Whole(whole) => (whole.size()[0], whole.size()[1]),
            Factor::Product(a, b) => (a.size()[0], b.size()[1]),
            Factor::Tucker { core, a, b } => (a.size()[1], b.size()[1] * core.size()[2]),
        }
    }

    /// float32 `[rows, columns]`.
    fn matrix(&self, device: Device) -> Tensor {
        let get = |tensor: &Tensor| tensor.to_device(device).to_kind(Kind::Float);
        match self {
            Factor::Whole(whole) => get(whole),
            Factor::Product(a, b) => get(a).matmul(&get(b)),
            Factor::Tucker { core, a, b } => {
                let (rank_a, rank_b, kernel) = core.size3().expect("a core has three dimensions");
                let rows = get(a).tr().matmul(&get(core).view([rank_a, rank_b * kernel]));
                // [rows, rank_b, kernel] to [rows, kernel, columns] to [rows, columns, kernel]
                let rows = rows.view([-1, rank_b, kernel]).transpose(1, 2).matmul(&get(b));
                rows.transpose(1, 2).reshape([self.shape().0, self.shape().1])
            }
        }
    }
}

impl Delta {
    /// Rows, and columns with the kernel.
    pub(super) fn shape(&self) -> (i64, i64) {
        match self {
            Delta::LowRank(factor) | Delta::Hadamard(factor, _) => factor.shape(),
            Delta::Kronecker(a, b) => (a.shape().0 * b.shape().0, a.shape().1 * b.shape().1),
        }
    }

    fn matrix(&self, device: Device) -> Tensor {
        match self {
            Delta::LowRank(factor) => factor.matrix(device),
            Delta::Hadamard(a, b) => a.matrix(device) * b.matrix(device),
            Delta::Kronecker(a, b) => a.matrix(device).kron(&b.matrix(device)),
        }
    }
}

/// Applies changes with their scales, one after the other, to `weight` in place: float32 throughout and one rounding at
/// the end. `weight`, contiguous, holds the base when this is called.
pub(super) fn fuse(weight: &mut Tensor, changes: &[(f64, &Change)]) {
    let size = weight.size();
    let (rows, device) = (size[0], weight.device());
    if changes.iter().all(|(_, change)| change.is_plain_product()) {
        // by far the most files: the product adds itself up in one pass
        let flat = weight.view([rows, -1]);
        let mut sum = flat.to_kind(Kind::Float); // `flat` itself, where it is of that kind
        for (scale, change) in changes {
            let Delta::LowRank(Factor::Product(up, down)) = &change.delta else { unreachable!("tested above") };
            let up = up.to_device(device).to_kind(Kind::Float) * (scale * change.scaling);
            let _ = sum.addmm_(&up, &down.to_device(device).to_kind(Kind::Float));
        }
        if weight.kind() != Kind::Float {
            flat.shallow_clone().copy_(&sum);
        }
        return;
    }
    let channels = size[1];
    let base = weight.to_kind(Kind::Float).view([rows, channels, -1]);
    let mut sum = base.copy();
    for (scale, change) in changes {
        sum = change.apply(&base, sum, *scale);
    }
    weight.copy_(&sum.view_(&size));
}

impl Change {
    fn is_plain_product(&self) -> bool {
        self.dora.is_none() && matches!(self.delta, Delta::LowRank(Factor::Product(..)))
    }

    /// `base` is the model's weight, `sum` what earlier changes made of it; both float32 `[out, in, kernel]`.
    fn apply(&self, base: &Tensor, sum: Tensor, scale: f64) -> Tensor {
        let delta = self.delta.matrix(base.device()).view_as(base) * self.scaling;
        let get = |lengths: &Tensor, shape: [i64; 3]| lengths.to_device(base.device()).to_kind(Kind::Float).view(shape);
        match &self.dora {
            None => sum + delta * scale,
            // the scale counts as part of the change, and lengths are those of the base with this change alone
            Some(Dora::Peft(lengths)) => {
                let delta = delta * scale;
                let norm = (base + &delta).norm_scalaropt_dim(2.0, [1, 2].as_slice(), true);
                (sum + delta) * (get(lengths, [-1, 1, 1]) / norm)
            }
            // the scale weighs the new lengths only
            Some(Dora::Lycoris { lengths, of_rows }) => {
                let sum = sum + delta;
                let (over, shape) = if *of_rows { ([1, 2], [-1, 1, 1]) } else { ([0, 2], [1, -1, 1]) };
                let norm = sum.norm_scalaropt_dim(2.0, over.as_slice(), true) + f64::from(f32::EPSILON);
                let factor = get(lengths, shape) / norm;
                sum * if scale == 1.0 { factor } else { (factor - 1.0) * scale + 1.0 }
            }
        }
    }
}
