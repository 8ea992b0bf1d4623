// The page begins: the theme, then the data, then the table or the one answer.

const theme = byId("theme");
const preferred = matchMedia("(prefers-color-scheme: dark)");
const showTheme = (dark) => {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(dark));
};
showTheme(preferred.matches);
preferred.addEventListener("change", () => showTheme(preferred.matches));
theme.addEventListener("click", () => showTheme(theme.getAttribute("aria-pressed") !== "true"));

/** The page's data: JSON, or JSON that was compressed with gzip and written in base 64. */
const load = async () => {
  const { type, textContent } = byId("data");
  if (type === "application/json") return JSON.parse(textContent);
  const bytes = Uint8Array.from(atob(textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
};

load()
  .then((data) => {
    if (data.single) exampleView(data, byId("example")).draw(data.examples[0]);
    else exampleTable(data);
    document.documentElement.dataset.ready = "yes";
  })
  .catch((error) => {
    byId("failure").hidden = false;
    byId("failure").textContent = `The examples cannot be shown: ${error.message}. Open the page in a current browser.`;
  });
