//! A server on loopback that behaves as a test tells it to, well or badly.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::Value;

/// What came in.
#[derive(Debug, Clone)]
pub struct Asked {
    pub path: String,
    pub authorization: Option<String>,
    pub body: Value,
    /// How often this path was asked with this body before.
    pub times: usize,
}

/// What goes out.
pub enum Act {
    Json(Value),
    /// Status, further header lines, body.
    Status(u16, &'static str, String),
    /// All headers and the first half of the body.
    Half(Value),
    /// A status line that breaks off.
    Torn,
    /// Nothing, as long as this.
    Hang(Duration),
    /// Status 200 with this body.
    Raw(&'static str),
    /// Piece by piece, in about this time.
    Slow(Duration, Value),
}

type Behaviour = dyn Fn(&Asked) -> Act + Send + Sync;

pub struct Server {
    pub url: String,
    port: u16,
    log: Arc<Mutex<Vec<Asked>>>,
    closed: Arc<AtomicBool>,
}

impl Server {
    pub fn start(behave: impl Fn(&Asked) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let behave: Arc<Behaviour> = Arc::new(behave);
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::new(Mutex::new(HashMap::new()));
        let closed = Arc::new(AtomicBool::new(false));
        let (own_log, own_closed) = (Arc::clone(&log), Arc::clone(&closed));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if own_closed.load(Ordering::Relaxed) {
                    break;
                }
                let (behave, log, seen) = (Arc::clone(&behave), Arc::clone(&own_log), Arc::clone(&seen));
                thread::spawn(move || {
                    let Some(mut stream) = stream.ok() else { return };
                    let Some(mut asked) = read(&mut stream) else {
                        return;
                    };
                    let key = format!("{} {}", asked.path, asked.body);
                    let mut seen: std::sync::MutexGuard<'_, HashMap<String, usize>> = seen.lock().unwrap();
                    let times = seen.entry(key).or_insert(0);
                    asked.times = *times;
                    *times += 1;
                    drop(seen);
                    log.lock().unwrap().push(asked.clone());
                    // A client that has gone away is its own business.
                    let _ = answer(&mut stream, behave(&asked));
                });
            }
        });
        Self {
            url: format!("http://127.0.0.1:{port}"),
            port,
            log,
            closed,
        }
    }

    /// Everything asked so far.
    pub fn log(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }

    /// Accepts nobody any more.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        // Wakes the loop, which then lets its listener go.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        while TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

fn read(stream: &mut TcpStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut length, mut authorization) = (0, None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "authorization" => authorization = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Asked {
        path,
        authorization,
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
        times: 0,
    })
}

fn answer(stream: &mut TcpStream, act: Act) -> std::io::Result<()> {
    let head = |status: u16, more: &str, length: usize| {
        format!(
            "HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nConnection: close\r\n{more}Content-Length: {length}\r\n\r\n"
        )
    };
    match act {
        Act::Json(value) => {
            let body = value.to_string();
            write!(stream, "{}{body}", head(200, "", body.len()))
        }
        Act::Status(status, more, body) => write!(stream, "{}{body}", head(status, more, body.len())),
        Act::Half(value) => {
            let body = value.to_string();
            write!(stream, "{}{}", head(200, "", body.len()), &body[..body.len() / 2])
        }
        Act::Torn => stream.write_all(b"HTTP/1.1 20"),
        Act::Hang(time) => {
            thread::sleep(time);
            Ok(())
        }
        Act::Raw(body) => write!(stream, "{}{body}", head(200, "", body.len())),
        Act::Slow(time, value) => {
            let body = value.to_string();
            stream.write_all(head(200, "", body.len()).as_bytes())?;
            for piece in body.as_bytes().chunks(body.len().div_ceil(8)) {
                thread::sleep(time / 8);
                stream.write_all(piece)?;
                stream.flush()?;
            }
            Ok(())
        }
    }
}
