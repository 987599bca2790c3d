//! Shows the dashboard of the demo's first host outside of the demo's namespaces.
//!
//! The command opens the TCP port before it enters them, and passes it to the process inside as its
//! standard input. That process connects each client with the agent of the first host.

use std::{
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, OwnedFd},
    process::Stdio,
    thread,
};

/// Opens the port outside of the namespaces.
///
/// # Errors
/// Fails if the address cannot be used.
pub fn open(address: SocketAddr) -> io::Result<Stdio> {
    Ok(OwnedFd::from(TcpListener::bind(address)?).into())
}

/// Connects every client of the port, which is the standard input, with a server inside.
///
/// # Errors
/// Fails if the standard input or the thread cannot be used.
pub fn show(server: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let accept = move || {
        for client in listener.incoming().flatten() {
            // A client whose server does not answer is closed.
            let Ok(server) = TcpStream::connect(server) else { continue };
            let _ = connect(&client, &server);
        }
    };
    thread::Builder::new().name("window".to_owned()).spawn(accept).map(drop)
}

/// Copies in both directions until both sides are closed.
fn connect(client: &TcpStream, server: &TcpStream) -> io::Result<()> {
    for (from, to) in [(client, server), (server, client)] {
        let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
        let copy = move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        };
        thread::Builder::new().name("window".to_owned()).spawn(copy)?;
    }
    Ok(())
}
