//! From the tensors that a file has for one weight to its change: which algorithm it is, and whether the parts fit each
//! other and the weight.

use tch::Tensor;

use super::change::{Change, Delta, Dora, Factor};
use super::file::{Parts, damaged, mismatch};
use super::keys::Part;
use crate::error::Result;

/// `shape` is the weight's; `alpha` what the header says, which a key of its own overrules; with `rank_root` alpha is
/// divided by the root of the rank.
///
/// # Errors
/// `lora_damaged`, `lora_mismatch`.
pub(super) fn change(
    module: &str,
    mut parts: Parts,
    shape: &[i64],
    alpha: Option<f64>,
    rank_root: bool,
) -> Result<Change> {
    let own_alpha = parts.remove(&Part::Alpha).map(|alpha| scalar(module, &alpha)).transpose()?;
    let (magnitude, dora_scale) = (parts.remove(&Part::Magnitude), parts.remove(&Part::DoraScale));
    let kernel: i64 = shape[2..].iter().product();
    let mut reader = Reader { module, parts, kernel };
    let (delta, rank) = reader.delta()?;
    if let Some((part, _)) = reader.parts.first_key_value() {
        return Err(damaged(format!("{module} has {part:?}, which belongs to another algorithm than its other parts")));
    }
    let wanted = (shape[0], shape[1..].iter().product::<i64>());
    if delta.shape() != wanted {
        let ((rows, columns), (out, inputs)) = (delta.shape(), wanted);
        return Err(mismatch(format!("{module} is {out} x {inputs} in this model, {rows} x {columns} in the LoRA")));
    }
    // 0 means "none was set", as kohya's scripts and LyCORIS read it
    let scaling = match (own_alpha.or(alpha).filter(|alpha| *alpha != 0.0), rank) {
        (Some(alpha), Some(rank)) if rank_root && own_alpha.is_none() => alpha / (rank as f64).sqrt(),
        (Some(alpha), Some(rank)) => alpha / rank as f64,
        _ => 1.0,
    };
    let dora = dora(module, magnitude, dora_scale, shape)?;
    Ok(Change { delta, scaling, dora })
}

struct Reader<'a> {
    module: &'a str,
    parts: Parts,
    /// Values of the weight's kernel; 1 for a matrix.
    kernel: i64,
}

impl Reader<'_> {
    /// And the rank that alpha is divided by; `None` where alpha does not count.
    fn delta(&mut self) -> Result<(Delta, Option<i64>)> {
        use Part::*;
        if self.has(&[HadaW1A, HadaW1B, HadaW2A, HadaW2B]) {
            let first = self.factor(HadaW1A, HadaW1B, HadaT1)?;
            let second = self.factor(HadaW2A, HadaW2B, HadaT2)?;
            if first.shape() != second.shape() {
                let (a, b) = (first.shape(), second.shape());
                return Err(self.wrong(format!("its two factors are {a:?} and {b:?}")));
            }
            let rank = rank(&first);
            return Ok((Delta::Hadamard(first, second), rank));
        }
        if self.has(&[LokrW1, LokrW1A, LokrW1B, LokrW2, LokrW2A, LokrW2B]) {
            let first = self.whole_or(LokrW1, LokrW1A, LokrW1B, None)?;
            let second = self.whole_or(LokrW2, LokrW2A, LokrW2B, Some(LokrT2))?;
            let rank = rank(&second).or(rank(&first));
            return Ok((Delta::Kronecker(first, second), rank));
        }
        let (up, down) = (self.flat(Up)?, self.flat(Down)?);
        let rank = down.size()[0];
        let factor = match self.parts.remove(&Mid) {
            None => self.product(up, down)?,
            Some(mid) => self.tucker(mid, up.tr(), down)?,
        };
        Ok((Delta::LowRank(factor), Some(rank)))
    }

    fn has(&self, any: &[Part]) -> bool {
        any.iter().any(|part| self.parts.contains_key(part))
    }

    /// A part as a matrix; a kernel lies flat behind the second dimension.
    fn flat(&mut self, part: Part) -> Result<Tensor> {
        let tensor = self.parts.remove(&part).ok_or_else(|| self.wrong(format!("{part:?} is missing")))?;
        let size = tensor.size();
        match size.len() {
            2 | 4 if size.iter().all(|n| *n > 0) => Ok(tensor.reshape([size[0], -1])),
            _ => Err(self.wrong(format!("{part:?} is {size:?}"))),
        }
    }

    fn factor(&mut self, a: Part, b: Part, core: Part) -> Result<Factor> {
        let (a, b) = (self.flat(a)?, self.flat(b)?);
        match self.parts.remove(&core) {
            None => self.product(a, b),
            Some(core) => self.tucker(core, a, b),
        }
    }

    fn whole_or(&mut self, whole: Part, a: Part, b: Part, core: Option<Part>) -> Result<Factor> {
        if self.parts.contains_key(&whole) {
            return Ok(Factor::Whole(self.flat(whole)?));
        }
        let (a, b) = (self.flat(a)?, self.flat(b)?);
        match core.and_then(|core| self.parts.remove(&core)) {
            None => self.product(a, b),
            Some(core) => self.tucker(core, a, b),
        }
    }

    fn product(&self, a: Tensor, b: Tensor) -> Result<Factor> {
        if a.size()[1] != b.size()[0] {
            return Err(self.wrong(format!("its ranks do not agree: {:?} and {:?}", a.size(), b.size())));
        }
        Ok(Factor::Product(a, b))
    }

    /// `a` is `[rank, rows]`, `b` `[rank, columns]`.
    fn tucker(&self, core: Tensor, a: Tensor, b: Tensor) -> Result<Factor> {
        let size = core.size();
        let kernel: i64 = size.iter().skip(2).product();
        if size.len() != 4 || kernel != self.kernel || size[0] != a.size()[0] || size[1] != b.size()[0] {
            return Err(self.wrong(format!("its core is {size:?}, its factors {:?} and {:?}", a.size(), b.size())));
        }
        Ok(Factor::Tucker { core: core.reshape([size[0], size[1], kernel]), a, b })
    }

    fn wrong(&self, what: String) -> crate::error::Error {
        damaged(format!("{}: {what}", self.module))
    }
}

fn rank(factor: &Factor) -> Option<i64> {
    match factor {
        Factor::Whole(_) => None,
        Factor::Product(_, b) | Factor::Tucker { b, .. } => Some(b.size()[0]),
    }
}

fn scalar(module: &str, alpha: &Tensor) -> Result<f64> {
    if alpha.numel() != 1 {
        return Err(damaged(format!("{module}: alpha is {:?}, not one number", alpha.size())));
    }
    Ok(alpha.to_kind(tch::Kind::Double).reshape([1]).double_value(&[0]))
}

fn dora(module: &str, magnitude: Option<Tensor>, scale: Option<Tensor>, shape: &[i64]) -> Result<Option<Dora>> {
    if let Some(lengths) = magnitude {
        if lengths.numel() as i64 != shape[0] {
            return Err(mismatch(format!(
                "{module} has {} rows in this model, {} in the LoRA",
                shape[0],
                lengths.numel()
            )));
        }
        return Ok(Some(Dora::Peft(lengths.reshape([-1]))));
    }
    let Some(lengths) = scale else { return Ok(None) };
    let size = lengths.size();
    // [out, 1, ...] are lengths of rows, [1, in, ...] of input channels
    let of_rows = match size.as_slice() {
        [rows] if *rows == shape[0] => true,
        [rows, rest @ ..] if *rows == shape[0] && rest.iter().all(|n| *n == 1) => true,
        [1, channels, rest @ ..] if *channels == shape[1] && rest.iter().all(|n| *n == 1) => false,
        _ => return Err(mismatch(format!("{module} is {shape:?} in this model, its dora_scale {size:?}"))),
    };
    Ok(Some(Dora::Lycoris { lengths: lengths.reshape([-1]), of_rows }))
}
