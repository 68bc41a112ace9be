/** Pictures of a browser as RGB bytes, in a page or in a worker. */
import { PaliGemmaError } from "../common/errors.mjs";
import { checkValue, shown, TRANSPARENCY } from "../common/options.mjs";
import { checkPixels, isPixels } from "../common/paligemma.mjs";
import { opaque } from "../common/transparency.mjs";

const LONGEST_SIDE = 16384; // of a canvas
const MOST_PIXELS = 2 ** 26;

/** A picture as { data, width, height }: RGB, upright, transparent pixels on white or dropped. */
export async function decodePicture(picture, transparency = "white") {
  checkValue("transparency", transparency, TRANSPARENCY);
  if (picture instanceof ImageData) return { data: opaque(picture.data, transparency), width: picture.width, height: picture.height };
  if (isPixels(picture)) return checkPixels(picture);
  if (picture instanceof ImageBitmap) return pixelsOf(picture, transparency);
  if (picture instanceof Blob) return pixelsOf(await openPicture(picture), transparency);
  if (typeof picture === "string" || picture instanceof URL) return pixelsOf(await openPicture(await fetchPicture(picture)), transparency);
  throw new PaliGemmaError(
    `the picture must be a Blob, an ImageBitmap, ImageData, an address, or { data, width, height }, not ${shown(picture)}`,
  );
}

/** The file at an address. */
async function fetchPicture(address) {
  const response = await fetch(address).catch((error) => {
    throw new PaliGemmaError(`${address}: the picture cannot be fetched (${error.message})`);
  });
  if (!response.ok) throw new PaliGemmaError(`${address}: the picture cannot be fetched (the server answers ${response.status})`);
  return new File([await response.blob()], String(address));
}

/** A picture file as a bitmap, upright, its numbers as they are in the file. */
export async function openPicture(blob) {
  const name = blob.name ?? "this";
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
    throw new PaliGemmaError(`${name}: not a picture that this browser can read, or a broken one`);
  });
  const { width, height } = bitmap;
  if (Math.max(width, height) > LONGEST_SIDE || width * height > MOST_PIXELS) {
    throw new PaliGemmaError(`${name}: ${width} x ${height} pixels are more than this page can take; make it smaller`);
  }
  return bitmap;
}

/** The RGB bytes of a bitmap: { data, width, height }; transparent pixels on white, or their alpha dropped. */
function pixelsOf(bitmap, transparency) {
  const { width, height } = bitmap;
  let rgba = canvasBytes(bitmap);
  if (rgba.some((value, i) => i % 4 === 3 && value < 255)) rgba = textureBytes(bitmap);
  return { data: opaque(rgba, transparency), width, height };
}

function canvasBytes(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

/** The bytes of a transparent bitmap: a canvas multiplies colors by their opacity, a texture leaves them alone. */
function textureBytes(bitmap) {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) throw new PaliGemmaError("transparent pictures need WebGL, which this browser lacks; save it without transparency");
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const bytes = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, bytes);
  if (gl.getError()) throw new PaliGemmaError("the transparent picture is too large for this browser; make it smaller");
  return bytes;
}
