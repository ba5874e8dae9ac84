// The theme that was chosen, set before anything is drawn; none is the system's own.

(() => {
  const KEY = "softprompt-theme";
  const root = document.documentElement;

  function kept() {
    try {
      return localStorage.getItem(KEY) ?? "";
    } catch {
      return ""; // a browser that keeps nothing
    }
  }

  function set(theme) {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
  }

  set(kept());
  document.addEventListener("DOMContentLoaded", () => {
    const choice = document.getElementById("theme");
    choice.value = kept();
    choice.addEventListener("change", () => {
      set(choice.value);
      try {
        if (choice.value) localStorage.setItem(KEY, choice.value);
        else localStorage.removeItem(KEY);
      } catch {
        // It holds until the page is closed.
      }
    });
  });
})();
