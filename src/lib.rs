pub mod core;
pub mod model;
pub mod wire;
