//! `GuestManager.pressure` and `setPressurePolicy`.

use std::rc::Rc;

use sepal_schema::{
    error::{Error, Kind},
    node_capnp::pressure_state,
    store_capnp::stored_settings,
};

use super::{policy::Policy, psi::Trigger};
use crate::{definitions::Definitions, manager::Manager};

/// Answers `pressure`.
///
/// # Errors
/// `NO_RESOURCES`: no thread could ask the kernel.
pub(crate) async fn answer(manager: &Rc<Manager>, mut to: pressure_state::Builder<'_>) -> Result<(), Error> {
    let pressure = &manager.pressure;
    let watched = pressure.watching.borrow().is_some();
    let supported = match watched {
        true => Ok(()),
        false => {
            let asked = manager.handle.spawn_blocking(Trigger::try_out).await;
            asked.map_err(|error| Error::new(Kind::NoResources, error.to_string()))?
        }
    };
    let (policy, now) = (pressure.policy(), pressure.now());
    to.set_supported(supported.is_ok());
    to.set_detail(supported.err().unwrap_or_default());
    policy.write(to.reborrow().init_policy());
    to.set_under_pressure(pressure.calm.get().is_pressed(now, &policy));
    to.set_taken_bytes(super::taken(manager));
    to.set_inflations(pressure.inflations.get());
    to.set_deflations(pressure.deflations.get());
    Ok(())
}

/// Carries out `setPressurePolicy`: the policy is kept, where the manager keeps anything, before it is used.
///
/// # Errors
/// As [`Policy::read`], or that it cannot be kept.
pub(crate) async fn change(manager: &Rc<Manager>, policy: Policy) -> Result<(), Error> {
    if let Ok(store) = manager.definitions.store() {
        let write = |mut settings: stored_settings::Builder<'_>| {
            policy.write(settings.reborrow().init_pressure());
            Ok(())
        };
        store.set_settings(write).await?;
    }
    super::set_policy(manager, policy);
    Ok(())
}

/// The policy that was set last, as far as the manager keeps it; the default one where none was set, or it cannot be read.
pub(super) fn kept(definitions: &Definitions) -> Policy {
    let Ok(store) = definitions.store() else {
        return Policy::default();
    };
    let kept = store.settings(|settings| {
        let kept = settings.has_pressure().then(|| settings.get_pressure()).transpose()?;
        Ok(kept.map(Policy::read))
    });
    match kept {
        Ok(None) => Policy::default(),
        Ok(Some(Ok(policy))) => policy,
        Ok(Some(Err(error))) => not_fit(&error),
        Err(error) => not_fit(&error),
    }
}

fn not_fit(error: &dyn std::fmt::Display) -> Policy {
    tracing::warn!("the policy for memory pressure that was kept cannot be used, the default is: {error}");
    Policy::default()
}
