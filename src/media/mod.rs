//! Pictures as bytes: encoding, and the generation parameters inside the file. No tensors, no network.

mod codec;
mod decode;
mod metadata;

pub use codec::{encode, to_base64, to_data_uri};
pub use decode::decode;
pub use metadata::{Metadata, read_parameters};
