// The sidebar tab, its commands, settings and the about badge. The pack works the same without this file.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { PanelControl } from "./stretto_panel.js";
import { planFacts, runsOf, workflowOf } from "./stretto_server.js";
import { SidebarView } from "./stretto_sidebar_view.js";
import { loadTexts, say } from "./stretto_texts.js";

const TAB = "stretto";
const state = { facts: null, runs: null, workflow: null, panel: new PanelControl(() => view?.showPanel()) };
const badge = { label: "Stretto", url: new URL("./docs/StrettoReport.md", import.meta.url).href, icon: "pi pi-bolt" };
let view = null;
let registered = false;
let ready = false; // settings are told once before the page stands

function showTab(wanted) {
  const manager = app.extensionManager;
  if (!manager?.registerSidebarTab || wanted === registered) return;
  registered = wanted;
  if (!wanted) return manager.unregisterSidebarTab?.(TAB);
  return manager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-bolt",
    title: "Stretto",
    tooltip: say("tooltip"),
    type: "custom",
    render: (element) => {
      view?.close();
      view = new SidebarView(element, state);
      state.panel.refresh();
    },
    destroy: () => {
      view?.close();
      view = null;
    },
  });
}

/** Open the tab where it is not open. */
async function openTab() {
  showTab(true);
  if (!view) await app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB}`);
}

/** Fetch what the last prompt left, or the newest one that left anything. */
async function takeRuns(promptId) {
  try {
    const runs = await runsOf(promptId);
    if (promptId && !runs.length) return; // nothing of ours took part
    state.runs = runs;
    state.workflow = runs[0]?.prompt_id ? await workflowOf(runs[0].prompt_id) : null;
  } catch {
    return; // the server is busy or gone: what is shown stays
  }
  view?.showRun();
}

app.registerExtension({
  name: "stretto.sidebar",
  aboutPageBadges: [badge],
  settings: [
    {
      id: "Stretto.Sidebar.Show",
      category: ["Stretto", "Sidebar", "Show"],
      name: "Show the Stretto tab in the sidebar",
      type: "boolean",
      defaultValue: true,
      onChange: (wanted) => ready && showTab(wanted),
    },
    {
      id: "Stretto.Panel.Port",
      category: ["Stretto", "Panel", "Port"],
      name: "Port of the A/B panel on this machine",
      tooltip: "0 picks a free one each time the panel is started.",
      type: "number",
      defaultValue: 0,
      attrs: { min: 0, max: 65535, step: 1, showButtons: false, useGrouping: false },
    },
    {
      id: "Stretto.Panel.OpenIn",
      category: ["Stretto", "Panel", "OpenIn"],
      name: "Where Compare now opens the panel",
      type: "combo",
      options: [
        { text: "Sidebar", value: "sidebar" },
        { text: "New tab", value: "tab" },
      ],
      defaultValue: "sidebar",
    },
  ],
  commands: [
    { id: "Stretto.ShowSidebar", label: "Show the plan of this graph", icon: "pi pi-bolt", function: openTab },
    {
      id: "Stretto.CompareNow",
      label: "Compare now",
      icon: "pi pi-sliders-h",
      function: async () => {
        await openTab();
        await state.panel.compare();
      },
    },
    {
      id: "Stretto.OpenPanel",
      label: "Open the panel's full page",
      icon: "pi pi-external-link",
      function: () => state.panel.openPage(),
    },
    { id: "Stretto.StopPanel", label: "Stop the panel", icon: "pi pi-stop", function: () => state.panel.stop() },
  ],
  menuCommands: [
    {
      path: ["Extensions", "Stretto"],
      commands: ["Stretto.ShowSidebar", "Stretto.CompareNow", "Stretto.OpenPanel", "Stretto.StopPanel"],
    },
  ],
  async setup() {
    await loadTexts();
    try {
      state.facts = await planFacts();
      badge.label = `Stretto ${state.facts.version}`;
    } catch {
      state.facts = null; // the tab says so
    }
    ready = true;
    showTab(app.extensionManager?.setting?.get("Stretto.Sidebar.Show") ?? true);
    await takeRuns();
    for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(event, ({ detail }) => takeRuns(detail?.prompt_id));
    }
  },
});
