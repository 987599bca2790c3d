//! The `gossamer` program: runs one subcommand and exits with a code for scripts.

use std::process::ExitCode;

use gossamer::{
    cli::{parse, run, usage_error},
    cni, netavark,
};

fn main() -> ExitCode {
    // A CNI runtime sets this variable and passes no arguments.
    if std::env::var_os(cni::COMMAND).is_some() && std::env::args_os().len() == 1 {
        return cni::run();
    }
    if let Some(call) = netavark::Call::new(std::env::args_os()) {
        return netavark::run(&call);
    }
    match parse() {
        Ok(cli) => run(cli),
        Err(error) => {
            // A netavark plugin must report errors on standard output.
            let call = netavark::Call::unknown(std::env::args_os()).filter(|_| error.use_stderr());
            call.map_or_else(|| usage_error(&error), |call| netavark::run(&call))
        }
    }
}
