// Render equations with the KaTeX of this folder: `$...$` and `$$...$$` of pages, docstrings and notebooks.
document.addEventListener("DOMContentLoaded", () => {
  const escaped = [
    { left: "\\(", right: "\\)", display: false },
    { left: "\\[", right: "\\]", display: true },
  ];
  const dollars = [
    { left: "$$", right: "$$", display: true },
    { left: "$", right: "$", display: false },
  ];
  for (const element of document.querySelectorAll(".arithmatex")) {
    renderMathInElement(element, { delimiters: escaped, throwOnError: false });
  }
  for (const element of document.querySelectorAll(".jupyter-wrapper .jp-RenderedMarkdown")) {
    renderMathInElement(element, { delimiters: [...dollars, ...escaped], throwOnError: false });
  }
});
