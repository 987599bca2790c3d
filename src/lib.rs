pub mod core;
pub mod dataplane;
pub mod model;
pub mod wire;
