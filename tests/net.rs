//! Downloads and uploads over real sockets. `127.0.0.2` plays the public internet and `127.0.0.1` the private network;
//! names are what each test says they are. The S3 server is another project's and checks every signature.

#[path = "net/adapters.rs"]
mod adapters;
#[path = "net/download.rs"]
mod download;
#[path = "net/fake_host.rs"]
mod fake_host;
#[path = "net/upload.rs"]
mod upload;
