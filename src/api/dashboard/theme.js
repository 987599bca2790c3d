// Light or dark. A classic script in the head, not a module: modules run after the first paint, and the page
// would flash in the wrong theme.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

  // Where storage is forbidden (a private window, a sandbox) the choice lasts as long as the page.
  try {
    const kept = localStorage.getItem("gossamer-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch {}

  // Canvases hold pixels, so they must hear of it.
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
