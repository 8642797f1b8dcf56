//! Where processes that torchrun started first meet: process 0 tells the others what they need to find each other.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::refuse;
use crate::error::Result;

/// RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and others set them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    pub rank: usize,
    pub size: usize,
    pub host: String,
    /// torchrun listens there itself: we meet one further.
    pub port: u16,
}

/// What is said first, so that a stranger who calls is none of us.
const GREETING: &[u8; 8] = b"svdhub-1";
/// A machine may start minutes after another.
const PATIENCE: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(100);

impl Meeting {
    /// Gives all what process 0 has.
    pub fn share(&self, bytes: &mut [u8]) -> Result<()> {
        let port = self.port.checked_add(1);
        let port = port.ok_or_else(|| refuse("MASTER_PORT leaves no port above it"))?;
        let told = match self.rank {
            0 => self.tell(port, bytes),
            _ => self.ask(port, bytes),
        };
        told.map_err(|error| {
            refuse(format!(
                "process {} of {} does not meet the others at {}:{port} ({error})",
                self.rank, self.size, self.host
            ))
        })
    }

    fn tell(&self, port: u16, bytes: &[u8]) -> std::io::Result<()> {
        let listener = TcpListener::bind(("0.0.0.0", port))?;
        listener.set_nonblocking(true)?;
        let (started, mut told) = (Instant::now(), 1);
        while told < self.size {
            match listener.accept() {
                Ok((caller, _)) => {
                    // one that hangs up, or is a stranger, comes again or does not matter
                    told += usize::from(answer(caller, bytes).is_ok());
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(_) if started.elapsed() > PATIENCE => {
                    return Err(ErrorKind::TimedOut.into());
                }
                Err(_) => sleep(PAUSE),
            }
        }
        Ok(())
    }

    fn ask(&self, port: u16, bytes: &mut [u8]) -> std::io::Result<()> {
        let started = Instant::now();
        let mut call = || -> std::io::Result<()> {
            let mut stream = TcpStream::connect((self.host.as_str(), port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(GREETING)?;
            stream.read_exact(bytes)?;
            // all of it is here: process 0 may count this one
            stream.write_all(&[1])
        };
        loop {
            match call() {
                Err(_) if started.elapsed() < PATIENCE => sleep(PAUSE),
                result => return result,
            }
        }
    }
}

fn answer(mut caller: TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    caller.set_nonblocking(false)?;
    caller.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut greeting = [0; GREETING.len()];
    caller.read_exact(&mut greeting)?;
    if greeting != *GREETING {
        return Err(ErrorKind::InvalidData.into());
    }
    caller.write_all(bytes)?;
    caller.read_exact(&mut [0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_get_what_process_0_has_and_strangers_do_not_count() {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let above = free.local_addr().expect("an address").port();
        drop(free);
        let meeting = |rank| Meeting {
            rank,
            size: 4,
            host: "127.0.0.1".into(),
            port: above - 1,
        };
        std::thread::scope(|scope| {
            // those who come early wait, and a stranger is in nobody's way
            let others: Vec<_> = (1..4)
                .map(|rank| {
                    scope.spawn(move || {
                        let mut bytes = [0; 128];
                        meeting(rank).share(&mut bytes).expect("meets");
                        bytes
                    })
                })
                .collect();
            sleep(Duration::from_millis(150));
            scope.spawn(move || {
                for _ in 0..20 {
                    if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", above)) {
                        return drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n"));
                    }
                    sleep(Duration::from_millis(20));
                }
            });
            meeting(0).share(&mut [7; 128]).expect("meets");
            for other in others {
                assert_eq!(other.join().expect("no panic"), [7; 128]);
            }
        });
    }
}
