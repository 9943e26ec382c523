//! Power: what changes whether the guest runs. The ladder and the deadlines are the guest manager's.

use capnp::capability::Rc as ServerRc;
use sepal_schema::{
    error::{Error, Kind, write_completion},
    guest_capnp::power,
};

use super::guest::GuestServer;

type Reply = Result<(), capnp::Error>;

impl power::Server for GuestServer {
    async fn shutdown(self: ServerRc<Self>, _: power::ShutdownParams, mut results: power::ShutdownResults) -> Reply {
        let outcome = self.with_running(|vm| vm.press_power_button());
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn kill(self: ServerRc<Self>, _: power::KillParams, mut results: power::KillResults) -> Reply {
        // A newer guest is not this capability's to stop.
        let outcome = match self.state.report() {
            Some(report) => Ok(report),
            None => match self.controller.stop().await {
                Ok(()) => self
                    .state
                    .report()
                    .ok_or_else(|| Error::new(Kind::InternalError, "the guest left no report")),
                Err(error) => Err(error),
            },
        };
        match outcome {
            Ok(report) => report.write(results.get().init_report()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn stop(self: ServerRc<Self>, _: power::StopParams, mut results: power::StopResults) -> Reply {
        let error = Error::not_supported(
            "stop",
            "the guest manager waits and decides; a component only presses the button or kills",
        );
        error.write(results.get().init_error());
        Ok(())
    }

    async fn pause(self: ServerRc<Self>, _: power::PauseParams, mut results: power::PauseResults) -> Reply {
        let asked = self.with_running(|vm| {
            vm.pause();
            Ok(())
        });
        let outcome = match asked {
            Ok(()) => self.state.wait_until_paused().await,
            Err(error) => Err(error),
        };
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn resume(self: ServerRc<Self>, _: power::ResumeParams, mut results: power::ResumeResults) -> Reply {
        let outcome = self.with_running(|vm| {
            vm.resume();
            Ok(())
        });
        if outcome.is_ok() {
            self.state.resumed();
        }
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn reset(self: ServerRc<Self>, _: power::ResetParams, mut results: power::ResetResults) -> Reply {
        let error = Error::not_supported(
            "reset",
            "the guest manager ends the machine and makes another; a component has only one",
        );
        write_completion(&Err(error), results.get());
        Ok(())
    }

    async fn nmi(self: ServerRc<Self>, _: power::NmiParams, mut results: power::NmiResults) -> Reply {
        let outcome = self.with_running(|vm| vm.nmi());
        write_completion(&outcome, results.get());
        Ok(())
    }
}
