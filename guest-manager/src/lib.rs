//! The guest manager.
pub mod changed;
pub mod component;
pub mod events;
pub mod history;
pub mod host;
pub mod listener;
pub mod model;
pub mod problems;
pub mod registry;
pub mod serial;
