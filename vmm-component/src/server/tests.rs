//! The controller and its server over a real connection, with machines that only pretend.
