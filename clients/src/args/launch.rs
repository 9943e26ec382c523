//! What `guest launch` can be told.

use clap::Args;

use super::options::GuestOptions;

#[derive(Debug, Args)]
pub(crate) struct Launch {
    /// Name of the guest: letters, digits, '.', '_' and '-' [default: the manager chooses]
    pub(crate) name: Option<String>,
    /// Leave the guest running, and a guest manager with it; print its name
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Only tell whether the guest could be launched, as far as that is known without starting anything
    #[arg(long, conflicts_with = "detach")]
    pub(crate) check: bool,
    #[command(flatten)]
    pub(crate) options: GuestOptions,
}
