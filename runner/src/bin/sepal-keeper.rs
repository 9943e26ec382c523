//! The keeper: parent of a guest manager's components. Started by the manager, never by hand; see `sepal_runner::keeper`.

fn main() -> std::process::ExitCode {
    match sepal_runner::keeper::run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sepal-keeper: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
