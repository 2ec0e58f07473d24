//! Functions of one float32 as torch and numpy round them, which is otherwise than Rust in the last bits: differences of
//! them are divided by small steps, where those bits show.

use tch::Tensor;

pub(super) fn exp(x: f32) -> f32 {
    value(Tensor::from(x).exp())
}

pub(super) fn ln(x: f32) -> f32 {
    value(Tensor::from(x).log())
}

/// The root, which torch rounds otherwise than Rust more often than not.
pub(super) fn sqrt(x: f32) -> f32 {
    value(Tensor::from(x).sqrt())
}

pub(super) fn expm1(x: f32) -> f32 {
    value(Tensor::from(x).expm1())
}

/// The logarithm as numpy has it on processors with vectors: the quotient of two polynomials around 1, up to three units
/// of the last place off. Where diffusers hands float32 to `np.log`.
pub(super) fn numpy_ln(x: f32) -> f32 {
    const P: [f32; 6] = [0.0, 1.0, 2.1126776, 1.4800006, 0.38088378, 0.025899792];
    const Q: [f32; 6] = [1.0, 2.6126776, 2.453006, 0.9864943, 0.15464763, 0.0058750953];
    if !x.is_normal() || x < 0.0 {
        return x.ln();
    }
    // x is 2^exponent times a mantissa from the root of a half to the root of 2
    let bits = x.to_bits();
    let mut exponent = (bits >> 23) as i32 - 126;
    let mut mantissa = f32::from_bits(bits & 0x007f_ffff | 0x3f00_0000);
    if mantissa <= std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1;
        mantissa *= 2.0;
    }
    let y = mantissa - 1.0;
    let polynomial = |c: &[f32; 6]| c[..5].iter().rev().fold(c[5], |sum, &c| sum.mul_add(y, c));
    (exponent as f32).mul_add(std::f32::consts::LN_2, polynomial(&P) / polynomial(&Q))
}

fn value(tensor: Tensor) -> f32 {
    tensor.double_value(&[]) as f32
}

/// The sum of tensors with factors.
pub(super) fn weighted_sum(terms: &[(f32, &Tensor)]) -> Tensor {
    let ((factor, tensor), rest) = terms.split_first().expect("a sum has terms");
    rest.iter().fold(*tensor * f64::from(*factor), |sum, (factor, tensor)| sum + *tensor * f64::from(*factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_numpy_s_to_the_bit() {
        // [hex(np.log(np.float32(x)).view(np.uint32)) for x in ...]
        for (x, bits) in EXPECTED {
            assert_eq!(numpy_ln(x).to_bits(), bits, "{x}");
        }
    }

    const EXPECTED: [(f32, u32); 11] = [
        (1e-10, 0xc1b834f1),
        (0.5, 0xbf317218),
        (0.70710677, 0xbeb17218),
        (1.0, 0x0),
        (14.614647, 0x402ba649),
        (0.7921561, 0xbe6e96b6),
        (0.43800947, 0xbf5354f0),
        (0.8094405, 0xbe587c65),
        (1.3377955, 0x3e9500fc),
        (0.6482176, 0xbeddf77c),
        (0.032415077, 0xc05b76e5),
    ];
}
