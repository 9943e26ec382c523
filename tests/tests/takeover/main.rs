//! Guests that go on without their manager: it is killed, replaced or told to give way, and the next one has them as they were.
//!
//! ```text
//!   scene     a world whose managers come and go while guests stay; printer is a guest that never stops printing
//!   killed    the manager is killed: what is printed, told, shared and counted goes on
//!   begun     what is created or begun again while there is no manager
//!   devices   what has another side on the host: sockets, ports, disks, processors
//!   found     what the next manager knows, counts and answers at once
//!   leases    what its owner has to do, and what follows if not
//!   slow      components that stand still, and waits that outlive their manager
//!   terminal  who sits at a guest's terminal
//!   upgrade   the next manager is of another version
//!   given_up  the manager gives way, or ends with its guests; the keeper is killed; intruders
//!   remembered guests that had ended
//!   stuck     what stands still, says nothing or is full
//! ```

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

mod begun;
mod devices;
mod found;
mod given_up;
mod killed;
mod leases;
mod printer;
mod remembered;
mod scene;
mod slow;
mod stuck;
mod terminal;
mod upgrade;
