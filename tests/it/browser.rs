//! Controls a headless Chromium by the `DevTools` protocol over two pipes.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use gossamer::lab::NetNs;
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};

const PROGRAM: &str = "chromium";
/// Covers the start of the browser and the first page, on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns whether Chromium is installed.
pub fn is_installed() -> bool {
    let mut asked = Command::new(PROGRAM);
    asked.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    asked.status().is_ok_and(|status| status.success())
}

/// A browser with one page. It is terminated when dropped.
pub struct Browser {
    child: Child,
    orders: File,
    answers: BufReader<File>,
    session: Value,
    number: u64,
    /// Errors that the page reported: exceptions, console errors, violations of its content security
    /// policy.
    pub page_errors: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts a browser in a network namespace, with an empty page.
    pub fn start(netns: &NetNs) -> anyhow::Result<Self> {
        let profile = tempfile::tempdir()?;
        let pipes = ["orders", "answers"].map(|name| profile.path().join(name));
        for pipe in &pipes {
            mkfifo(pipe, Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        let flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
                     --disable-background-networking --disable-component-update --hide-scrollbars \
                     --remote-debugging-pipe";
        let script = format!(
            "exec {PROGRAM} {flags} --user-data-dir={0} about:blank 3<{0}/orders 4>{0}/answers",
            profile.path().display()
        );
        let log = File::create(profile.path().join("log"))?;
        let mut command = Command::new("sh");
        command.args(["-c", &script]).env("HOME", profile.path()).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(log);
        let child = netns.spawn(&mut command)?;
        // In the order in which the shell opens the pipes: opening a pipe blocks until its other end is
        // open.
        let orders = OpenOptions::new().write(true).open(&pipes[0])?;
        let answers = BufReader::new(File::open(&pipes[1])?);
        let mut browser = Self {
            child,
            orders,
            answers,
            session: Value::Null,
            number: 0,
            page_errors: Vec::new(),
            _profile: profile,
        };
        let target = browser.order("Target.createTarget", json!({ "url": "about:blank" }))?;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        browser.session = browser.order("Target.attachToTarget", attach)?["sessionId"].take();
        for domain in ["Page", "Runtime", "Log"] {
            browser.order(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Sets the screen size in pixels and the color scheme (`light` or `dark`).
    pub fn set_screen(&mut self, width: u32, height: u32, scheme: &str) -> anyhow::Result<()> {
        let size = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500,
        });
        self.order("Emulation.setDeviceMetricsOverride", size)?;
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.order("Emulation.setEmulatedMedia", json!({ "features": [feature] }))?;
        Ok(())
    }

    /// Opens a URL and waits until the page is loaded.
    pub fn open(&mut self, url: &str) -> anyhow::Result<()> {
        self.order("Page.navigate", json!({ "url": url }))?;
        self.wait_for("document.documentElement?.dataset.ready === 'true'")
    }

    /// Evaluates a JavaScript expression and returns its value.
    pub fn ask(&mut self, expression: &str) -> anyhow::Result<Value> {
        let how = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.order("Runtime.evaluate", how)?;
        let thrown = answer["exceptionDetails"]["exception"]["description"].as_str();
        anyhow::ensure!(thrown.is_none(), "{expression}: {thrown:?}");
        Ok(answer["result"]["value"].take())
    }

    /// Waits until a JavaScript expression is true.
    pub fn wait_for(&mut self, expression: &str) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.ask(expression)? != true {
            if begun.elapsed() > TIMEOUT {
                let page = self.ask("document.body.innerText")?;
                anyhow::bail!("never: {expression}\n{page}\n{:?}", self.page_errors);
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Presses and releases a key, for example "Tab", "Enter" or "`ArrowRight`".
    pub fn press(&mut self, key: &str) -> anyhow::Result<()> {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "ArrowRight" => 39,
            "ArrowDown" => 40,
            other => anyhow::bail!("no such key: {other}"),
        };
        for kind in ["rawKeyDown", "keyUp"] {
            let event = json!({
                "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code,
            });
            self.order("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// Saves a screenshot.
    pub fn photograph(&mut self, path: &Path) -> anyhow::Result<()> {
        let taken = self.order("Page.captureScreenshot", json!({ "format": "png" }))?;
        let text = taken["data"].as_str().unwrap_or_default().as_bytes();
        fs::write(path, data_encoding::BASE64.decode(text)?)?;
        Ok(())
    }

    fn order(&mut self, method: &str, parameters: Value) -> anyhow::Result<Value> {
        self.number += 1;
        let mut order = json!({ "id": self.number, "method": method, "params": parameters });
        if !self.session.is_null() {
            order["sessionId"] = self.session.clone();
        }
        self.orders.write_all(format!("{order}\0").as_bytes())?;
        loop {
            let mut bytes = Vec::new();
            self.answers.read_until(0, &mut bytes)?;
            let Some((0, text)) = bytes.split_last() else {
                anyhow::bail!("{method}: the browser has ended");
            };
            let mut message: Value = serde_json::from_slice(text)?;
            if message["id"] == self.number {
                anyhow::ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].take());
            }
            self.listen(&message);
        }
    }

    fn listen(&mut self, message: &Value) {
        let parameters = &message["params"];
        let is_bad = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => parameters["type"] == "error",
            Some("Log.entryAdded") => parameters["entry"]["level"] == "error",
            _ => false,
        };
        if is_bad {
            self.page_errors.push(parameters.to_string());
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
