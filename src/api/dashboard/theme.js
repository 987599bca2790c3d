// Light or dark theme. This is a classic script in the head, because a module would run after the first
// paint, and the page would flash in the wrong theme.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

  // Without storage (a private window, a sandbox) the choice lasts until the page is closed.
  try {
    const kept = localStorage.getItem("gossamer-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch {}

  // Canvases have to be redrawn, so other parts are notified.
  function changed() {
    const button = document.getElementById("theme");
    if (button) button.textContent = isDark() ? "Light theme" : "Dark theme";
    document.dispatchEvent(new Event("themechange"));
  }

  system.addEventListener("change", changed);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try {
        localStorage.setItem("gossamer-theme", root.dataset.theme);
      } catch {}
      changed();
    });
    changed();
  });
})();
