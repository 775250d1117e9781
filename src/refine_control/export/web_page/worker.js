// Runs the painter apart from the page, which stays responsive. Messages in: {job}; out: {loaded}, {ready}, {step,
// steps}, {painted}, {failed}.

import { Painter } from "./painter.js";

const loading = Painter.load((loaded) => postMessage({ loaded }));
const failed = (error) => postMessage({ failed: error.message });
loading.then(({ about, page }) => postMessage({ ready: { about, page } }), failed);

onmessage = async ({ data }) => {
  try {
    const painter = await loading;
    const begin = performance.now();
    const painted = await painter.paint(data.job, (step, steps) => postMessage({ step, steps }));
    postMessage({ painted, seconds: (performance.now() - begin) / 1000 }, [painted.buffer]);
  } catch (error) {
    failed(error);
  }
};
