//! The guest manager.
pub mod events;
pub mod history;
pub mod model;
pub mod registry;
