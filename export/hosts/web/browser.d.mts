import type { Model, Pixels, Transparency } from "../common/types.mjs";

export * from "../common/types.mjs";

/** A file, an image's bytes in a Blob, what createImageBitmap gave, an address, or pixels. */
export type AnyPicture = Blob | ImageBitmap | URL | string | Pixels;

/** How a bundle runs in the browser. */
export interface About {
  backend: "wasm" | "webgpu";
  threads: number;
  precision: string;
  /** Side of the square that the model sees, in pixels. */
  size: number;
  /** How long it took to load. */
  seconds: number;
}

export interface PaliGemma extends Model<AnyPicture> {
  readonly about: About;
}

export interface LoadOptions {
  /** "auto", the default, takes WebGPU for large bundles where the browser has a device, and else WebAssembly. */
  backend?: "auto" | "wasm" | "webgpu";
  /** Of WebAssembly; 0, the default, takes up to eight. More than one needs a page that is cross-origin isolated. */
  threads?: number;
  /** The address of the folder node_modules, for pages that have no bundler to find the libraries in it. */
  modules?: string | URL;
  /** Called with the fraction of the bundle that has arrived. */
  onProgress?: (fraction: number) => void;
}

/** Fetch a bundle from the address of its folder, check it and open it in a worker. Throws PaliGemmaError. */
export function load(url: string | URL, options?: LoadOptions): Promise<PaliGemma>;

/** A picture as pixels: upright, without transparency. Throws PaliGemmaError. */
export function decodePicture(picture: AnyPicture, transparency?: Transparency): Promise<Pixels>;
